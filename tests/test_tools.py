"""The tools that record, transform and count models: each agrees with the eager model, whatever implementation is
forced. docs/convert.md has the table."""

import copy

import pytest
import timm
import torch
from helpers.implementations import force
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import kw
from kw import KWConfig, functional

# Layer, input behind the batch, larger input.
LAYERS = {
    "3x3": (nn.Conv2d(4, 8, 3, padding=1), (4, 6, 7), (4, 9, 8)),
    "strided": (nn.Conv2d(4, 8, 3, stride=2, dilation=2, padding=2), (4, 9, 8), (4, 11, 12)),
    "pointwise": (nn.Conv2d(4, 8, 1), (4, 6, 7), (4, 9, 8)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, padding="same"), (4, 6, 7), (4, 9, 8)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8, padding=1), (8, 6, 7), (8, 9, 8)),
    "1d": (nn.Conv1d(4, 8, 3), (4, 9), (4, 12)),
    "3d": (nn.Conv3d(4, 8, 3, padding=1), (4, 3, 4, 5), (4, 4, 5, 6)),
    "linear": (nn.Linear(4, 8), (5, 4), (7, 4)),
}
SOME = ("auto", "blocks")  # of each layer; the others compute one
CASES = [
    pytest.param(choice, name, marks=() if choice in SOME or name == "pointwise" else pytest.mark.slow)
    for choice in functional.CHOICES
    for name in LAYERS
]


def dynamic(name):
    """A model of one layer of this kind, in evaluation mode, with its two input sizes."""
    layer, *sizes = LAYERS[name]
    model = kw.convert(nn.Sequential(copy.deepcopy(layer)), {"0": "w"}, KWConfig(n=2, cell_in="1/2", cell_out="1/2"))
    kw.set_temperature(model, 0.3)
    return model.double().eval(), *sizes


def assert_serves(recorded, model, *sizes):
    """What was recorded computes what the model does, at other batch and input sizes."""
    for batch in (1, 3, 8):
        for size in sizes:
            x = torch.randn(batch, *size, dtype=torch.float64)
            with functional.use("grouped"):
                torch.testing.assert_close(recorded(x), model(x), rtol=1e-9, atol=1e-9)


exports_any_batch = pytest.mark.skipif(
    not hasattr(torch.export.Dim, "DYNAMIC"), reason="torch.export of 2.5 takes no batch of varying size"
)


def exported(model, x, dims):
    varying = {dim: torch.export.Dim.DYNAMIC for dim in dims}
    return torch.export.export(model, (x,), dynamic_shapes=(varying,))


@exports_any_batch
@torch.no_grad()
@pytest.mark.parametrize(("choice", "name"), CASES)
def test_an_exported_layer_takes_other_batches_and_sizes(choice, name):
    model, size, larger = dynamic(name)
    dims = (0, 1) if name == "linear" else (0, *range(2, 1 + len(size)))
    with force(choice):
        program = exported(model, torch.randn(2, *size, dtype=torch.float64), dims)
    assert_serves(program.module(), model, size, larger)


@torch.no_grad()
@pytest.mark.parametrize(("choice", "name"), CASES)
def test_a_traced_layer_takes_other_batches_and_sizes(choice, name):
    model, size, larger = dynamic(name)
    with force(choice):
        traced = torch.jit.trace(model, torch.randn(2, *size, dtype=torch.float64))
    assert_serves(traced, model, size, larger)


@exports_any_batch
@torch.no_grad()
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_is_exported_with_named_dimensions(strict):
    """Named dimensions are refused wherever an operation fixes a size or needs a relation between sizes."""
    model = network().eval()
    batch, height, width = torch.export.Dim("b"), torch.export.Dim("h", min=16), torch.export.Dim("w", min=16)
    varying = {0: batch, 2: height, 3: width}
    program = torch.export.export(
        model, (torch.randn(2, 3, 20, 24, dtype=torch.float64),), dynamic_shapes=(varying,), strict=strict
    )
    assert_serves(program.module(), model, (3, 16, 17), (3, 33, 28))


def network():
    """Layers of several kinds, of which the last is linear, in training mode."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    kw.convert(model, {"2": "depthwise", "3": "dense", "6": "linear"})
    kw.set_temperature(model, 0.3)
    return model.double()


def trained_once(model, compute, x):
    """Output and gradients."""
    model.zero_grad()
    out = compute(x)
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["auto", "grouped", "batched", "blocks"])
def test_a_model_compiled_for_varying_sizes_trains(choice):
    model = network()
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in ((3, 3, 16, 20), (2, 3, 20, 16)):
        x = torch.randn(size, dtype=torch.float64)
        with functional.use("grouped"):
            expected = trained_once(model, model, x)
        with force(choice):
            torch.testing.assert_close(trained_once(model, compiled, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["auto", "batched", "blocks"])
def test_torchs_compiler_makes_code_for_varying_sizes(choice):
    model = network()
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=True)
    for size in ((3, 3, 16, 20), (2, 3, 20, 16)):
        x = torch.randn(size, dtype=torch.float64)
        with functional.use("grouped"):
            expected = trained_once(model, model, x)
        with force(choice):
            torch.testing.assert_close(trained_once(model, compiled, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("choice", "name"), [case for case in CASES if case.values[0] != "triton"])
def test_gradients_of_each_sample_by_vmap(choice, name):
    """Also a gradient of a function without side effects, and of a vmapped one."""
    model, size, _ = dynamic(name)
    x = torch.randn(3, *size, dtype=torch.float64)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).square().sum()

    with force(choice):
        each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        of_inputs = grad(lambda x: vmap(loss, in_dims=(None, 0))(parameters, x).sum())(x)
    for k in range(len(x)):
        model.zero_grad()
        sample = x[k : k + 1].clone().requires_grad_()
        with functional.use("grouped"):
            model(sample).square().sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(each[key][k], parameter.grad, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(of_inputs[k : k + 1], sample.grad, rtol=1e-8, atol=1e-9)


@torch.no_grad()
def test_an_ensemble_by_vmap_over_parameters():
    models = [dynamic("3x3")[0] for _ in range(3)]
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    parameters, buffers = torch.func.stack_module_state(models)
    outs = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    for out, model in zip(outs, models, strict=True):
        torch.testing.assert_close(out, model(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("choice", "name"), [case for case in CASES if case.values[0] != "triton"])
def test_forward_mode_derivatives(choice, name):
    model, size, _ = dynamic(name)
    x, tangent = torch.randn(2, 2, *size, dtype=torch.float64)
    with functional.use("grouped"):
        expected = (model(x + 1e-6 * tangent) - model(x - 1e-6 * tangent)) / 2e-6
    with force(choice):
        torch.testing.assert_close(jvp(model, (x,), (tangent,))[1], expected, rtol=1e-6, atol=1e-6)
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(out.tangent, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("choice", ["auto", "grouped", "blocks"])
def test_fx_records_a_dynamic_layer_as_one_call(choice):
    model = network().eval()
    graph = torch.fx.symbolic_trace(model)
    with force(choice):
        assert_serves(graph, model, (3, 16, 17), (3, 20, 24))
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == [name for name, _ in model.named_children() if name != "warehouses"]


@torch.no_grad()
@pytest.mark.parametrize("dynamic", ["kw", "odconv", "dcd", "se"])
def test_torchvision_extracts_features_at_dynamic_layers(dynamic):
    model = timm.create_model("kw_resnet18", n=2, dynamic=dynamic, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)).eval()
    x = torch.randn(2, 3, 32, 32)
    features = create_feature_extractor(model, ["layer2", "layer3.0.conv1"])(x)
    seen = []
    model.layer2.register_forward_hook(lambda module, inputs, out: seen.append(out))
    model.layer3[0].conv1.register_forward_hook(lambda module, inputs, out: seen.append(out))
    model(x)
    torch.testing.assert_close(list(features.values()), seen)


@torch.no_grad()
@pytest.mark.parametrize("choice", ["auto", "grouped", "batched", "blocks"])
@pytest.mark.parametrize("name", ["3x3", "strided", "pointwise", "grouped", "depthwise", "3d"])
def test_channels_stay_last_in_memory(name, choice):
    model, size, _ = dynamic(name)
    layout = torch.channels_last_3d if name == "3d" else torch.channels_last
    x = torch.randn(2, *size, dtype=torch.float64)
    with force(choice):
        out, expected = model(x.contiguous(memory_format=layout)), model(x)
    assert out.is_contiguous(memory_format=layout) and expected.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("choice", ["blocks", "blocks folded", "batched", "triton"])
def test_torchs_counter_sees_the_products_of_every_implementation(choice):
    """The operators count as their products. (For gradients of convolutions in groups, torch counts more.)"""
    model, size, _ = dynamic("strided")
    x = torch.randn(2, *size, dtype=torch.float64, requires_grad=True)

    def counted(choice):
        totals = []
        for needs_grad in (False, True):
            with torch.set_grad_enabled(needs_grad), force(choice), FlopCounterMode(display=False) as counter:
                out = model(x)
                if needs_grad:
                    out.sum().backward()
            totals.append(counter.get_total_flops())
        return totals

    made = " folded" if "folded" in choice else ""
    assert counted(choice) == counted(f"batched{made}") and counted(choice)[0] == counted(f"grouped{made}")[0]
