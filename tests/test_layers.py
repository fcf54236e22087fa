"""Dynamic layers against the definition, sample by sample, and that they behave as torch's layers do."""

import copy
import io
import pickle

import pytest
import torch
from helpers import reference
from helpers.selection import paired, representative
from torch import nn
from torch.utils.checkpoint import checkpoint

import kw
from kw import KernelShape, KWConfig, Warehouse

DYNAMIC = {nn.Conv1d: kw.KWConv1d, nn.Conv2d: kw.KWConv2d, nn.Conv3d: kw.KWConv3d, nn.Linear: kw.KWLinear}
BUDGETS = ["1/2", 1, 2]

# torch's layer, its arguments, and the input's dimensions behind the batch.
CASES = {
    "plain": (nn.Conv2d, {"kernel_size": 3}, (4, 7, 5)),
    "padded": (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (4, 7, 5)),
    "no bias": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "bias": False}, (4, 7, 5)),
    "stride": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}, (4, 7, 5)),
    "uneven": (nn.Conv2d, {"kernel_size": (3, 1), "stride": (2, 1), "padding": (2, 0)}, (4, 7, 5)),
    "even kernel": (nn.Conv2d, {"kernel_size": (2, 4), "padding": 1}, (4, 7, 5)),
    "same": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "dilation": 2}, (4, 7, 5)),
    "same, even kernel": (nn.Conv2d, {"kernel_size": (2, 4), "padding": "same"}, (4, 7, 5)),
    "valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}, (4, 7, 5)),
    "dilation": (nn.Conv2d, {"kernel_size": 3, "dilation": (2, 1), "padding": 2}, (4, 7, 5)),
    "groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}, (4, 7, 5)),
    "depthwise": (nn.Conv2d, {"out_channels": 4, "kernel_size": 3, "groups": 4, "padding": 1}, (4, 7, 5)),
    "depthwise, doubled": (nn.Conv2d, {"kernel_size": 3, "groups": 4, "stride": 2}, (4, 7, 5)),
    "pointwise": (nn.Conv2d, {"kernel_size": 1}, (4, 7, 5)),
    "pointwise, stride": (nn.Conv2d, {"kernel_size": 1, "stride": (2, 3)}, (4, 7, 5)),
    "pointwise, padded": (nn.Conv2d, {"kernel_size": 1, "padding": 1}, (4, 7, 5)),
    "pointwise, same": (nn.Conv2d, {"kernel_size": 1, "padding": "same"}, (4, 7, 5)),
    "pointwise, groups": (nn.Conv2d, {"kernel_size": 1, "groups": 2}, (4, 7, 5)),
    "one position": (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (4, 1, 1)),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}, (4, 7, 5)),
    "replicate": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2}, (4, 7, 5)),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2}, (4, 7, 5)),
    "circular, same": (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"}, (4, 7, 5)),
    "reflect, pointwise": (nn.Conv2d, {"kernel_size": 1, "padding": 1, "padding_mode": "reflect"}, (4, 7, 5)),
    "1d": (nn.Conv1d, {"kernel_size": 3, "padding": 1, "stride": 2}, (4, 7)),
    "1d, same, reflect": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"}, (4, 7)),
    "1d, pointwise": (nn.Conv1d, {"kernel_size": 1}, (4, 7)),
    "3d": (nn.Conv3d, {"kernel_size": (1, 3, 2), "padding": (0, 1, 1), "stride": (1, 2, 1)}, (4, 3, 5, 4)),
    "3d, depthwise": (nn.Conv3d, {"kernel_size": 2, "groups": 4}, (4, 3, 5, 4)),
    "3d, pointwise": (nn.Conv3d, {"kernel_size": 1, "stride": 2}, (4, 3, 5, 4)),
    "linear": (nn.Linear, {}, (4,)),
    "linear, no bias": (nn.Linear, {"bias": False}, (4,)),
    "linear on tokens": (nn.Linear, {}, (7, 4)),
    "linear on a map": (nn.Linear, {}, (3, 5, 4)),
}


def build(case, n=1, norm="batch", **settings):
    """torch's layer of a case, ours with everything random, and what the definition needs to know of ours."""
    kind, arguments, size = CASES[case]
    sides = {"in_features": 4, "out_features": 8} if kind is nn.Linear else {"in_channels": 4, "out_channels": 8}
    arguments = {**sides, **arguments}
    static = kind(**arguments).double()
    config = KWConfig(n=n, attention_norm=norm, cell_in="1/2", cell_out="1/2", **settings)
    other = KernelShape("other", tuple(static.weight.shape))
    warehouse = Warehouse([other, KernelShape("layer", tuple(static.weight.shape))], config).double()
    layer = DYNAMIC[kind](**arguments, share=warehouse.shares[1]).double()
    for parameter in (warehouse.cells, *layer.parameters()):
        nn.init.normal_(parameter, std=0.5)
    if norm == "batch":
        layer.attention.norm.running_mean.normal_()
        layer.attention.norm.running_var.uniform_(0.5, 2)
    return static, layer, torch.Size(size)


def expected(static, layer, x, tau):
    config = layer.warehouse.config
    weight = static.weight
    m = weight.numel() // layer.warehouse.cells[0].numel()
    _, (_, anchors), _ = reference.hand_out([m, m], config.n)
    return reference.forward(layer, static, x, anchors, tau, layer.warehouse.cells)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case, n", paired(CASES, BUDGETS))
@torch.no_grad()
def test_output_is_that_of_the_definition(case, n):
    static, layer, size = build(case, n)
    layer.attention.temperature.fill_(0.3)
    for training in (False, True):
        layer.train(training)
        x = torch.randn(3, *size, dtype=torch.float64)
        torch.testing.assert_close(layer(x), expected(static, layer, x, 0.3), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case, batch", paired(CASES, [0, 1]))
@torch.no_grad()
def test_batch_of_one_or_none_is_served_in_evaluation(case, batch):
    static, layer, size = build(case)
    x = torch.randn(batch, *size, dtype=torch.float64)
    out = layer.eval()(x)
    if batch:
        torch.testing.assert_close(out, expected(static, layer, x, 0), rtol=1e-10, atol=1e-10)
    else:
        assert out.shape == static(x).shape


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch_in_evaluation(case):
    _, layer, size = build(case, n="1/2")
    x = torch.randn(7, *size, dtype=torch.float64)
    together = layer.eval()(x)
    torch.testing.assert_close(together[2:3], layer(x[2:3]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(together.flip(0), layer(x.flip(0)), rtol=1e-10, atol=1e-10)


GRADCHECKED = ["stride", "depthwise", "pointwise", "circular", "1d", "3d, pointwise", "linear", "linear on tokens"]


@pytest.mark.parametrize("case, training", paired(GRADCHECKED, [False, True]))
def test_gradients_are_those_of_the_output(case, training):
    _, layer, size = build(case, n="1/2")
    layer.train(training)
    layer.attention.temperature.fill_(0.3)
    x = torch.randn(2, *(min(side, 4) for side in size), dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs, fast_mode=True)


def test_gradients_through_a_nonlocal_basis_are_those_of_the_output():
    _, layer, size = build("padded", n="1/2", norm="layer", nonlocal_basis="1/16")
    x = torch.randn(2, *size, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs, fast_mode=True)


def pair():
    """Two convolutions of one warehouse."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return kw.convert(model, {"0": "shared", "2": "shared"}, KWConfig(n="1/2", attention_norm="layer"))


def test_layers_of_a_warehouse_add_up_their_gradients_in_its_cells():
    model = pair().double()
    cells = model.warehouses["shared"].cells
    first, second = (
        (model[0], torch.randn(2, 4, 5, 5).double()),
        (model[2], torch.randn(2, 8, 5, 5).double()),
    )
    single = [torch.autograd.grad(layer(x).square().sum(), cells)[0] for layer, x in (first, second)]
    assert single[0].any() and single[1].any()
    sum(layer(x).square().sum() for layer, x in (first, second)).backward()
    torch.testing.assert_close(cells.grad, single[0] + single[1])


def test_cells_are_owned_once_by_the_model():
    model = pair()
    owners = [key for key in model.state_dict() if key.endswith("cells")]
    assert owners == ["0.warehouse.cells"]
    assert [key for key, _ in model.named_parameters() if key.endswith("cells")] == owners
    storages = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
    assert len(set(storages)) == len(storages)
    for layer in (model[0], model[2]):
        assert layer.warehouse is model.warehouses["shared"]
        assert [module for module in layer.modules() if isinstance(module, Warehouse)] == [layer.warehouse]


def through_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, through_save, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "save", "pickle"],
)
@torch.no_grad()
def test_copy_computes_the_same_from_cells_of_its_own(duplicate):
    model = pair()
    x = torch.randn(2, 4, 7, 7)
    before = model(x)
    twin = duplicate(model)
    assert twin[0].warehouse is twin[2].warehouse is twin.warehouses["shared"] is not model.warehouses["shared"]
    assert torch.equal(twin(x), before)
    twin.warehouses["shared"].cells.add_(1)
    assert not torch.allclose(twin(x), before)
    assert torch.equal(model(x), before)


def test_model_to_double_takes_cells_along():
    model = pair()
    x = torch.randn(2, 4, 7, 7)
    single = model(x)
    double = model.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("each_choice")
@pytest.mark.parametrize("case", ["padded", "depthwise", "pointwise", "1d", "linear on tokens"])
@torch.no_grad()
def test_autocast_runs_in_bfloat16_near_float32(case):
    _, layer, size = build(case)
    layer = layer.float().eval()
    layer.warehouse.float()
    x = torch.randn(4, *size)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = layer(x)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.usefixtures("each_choice")
def test_autocast_trains_float32_parameters():
    model = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 4, 7, 7)).float().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.usefixtures("each_choice")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = pair().double()
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, *model.parameters()]
    model(x).square().sum().backward()
    plain = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for t, grad in zip(inputs, plain, strict=True):
        torch.testing.assert_close(t.grad, grad)


@pytest.mark.usefixtures("each_choice")
@pytest.mark.parametrize("backend", representative(["eager", "aot_eager"], "aot_eager".__eq__))  # which does more
def test_compiled_layer_gives_the_same(backend):
    torch.compiler.reset()
    model = pair()
    x = torch.randn(2, 4, 7, 7)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    kw.set_temperature(model, 1)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("case", ["plain", "1d", "3d"])
@pytest.mark.parametrize("dims", [-1, +1], ids=["too few", "too many"])
def test_input_of_other_dimensions_is_refused_by_layer_and_shape(case, dims):
    _, layer, size = build(case)
    shape = (*size, 2, 2)[: len(size) + 1 + dims]
    with pytest.raises(ValueError) as error:
        layer(torch.randn(shape, dtype=torch.float64))
    assert "'layer'" in str(error.value) and "batch" in str(error.value) and str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize(
    "build_layer",
    [
        lambda share: kw.KWConv2d(4, 8, 5, share=share),
        lambda share: kw.KWConv2d(4, 8, 3, groups=2, share=share),
        lambda share: kw.KWConv2d(8, 4, 3, share=share),
        lambda share: kw.KWConv1d(4, 8, 3, share=share),
        lambda share: kw.KWLinear(4, 8, share=share),
    ],
)
def test_a_share_for_a_kernel_of_another_shape_is_refused_by_layer_and_shapes(build_layer):
    share = Warehouse([KernelShape("stage.conv", (8, 4, 3, 3))], KWConfig()).shares[0]
    with pytest.raises(ValueError, match=r"'stage\.conv'.*shape \(.*\(8, 4, 3, 3\)"):
        build_layer(share)


def test_there_is_no_weight_and_the_message_says_why():
    _, layer, _ = build("plain")
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"'layer' is dynamic.*leave the layer out of the scope"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="has no attribute 'wieght'"):
        _ = layer.wieght


@pytest.mark.parametrize("case", CASES)
def test_bias_is_there_exactly_where_torchs_layer_has_one(case):
    static, layer, _ = build(case)
    assert (layer.bias is None) == (static.bias is None)


@torch.no_grad()
def test_temperature_one_is_the_static_layer_of_the_layers_own_cells():
    """At n = 1 each mixture is anchored to a cell of its own: the warm-up starts as a vanilla network."""
    layer = kw.KWConv2d(4, 8, 3, share=Warehouse([KernelShape("layer", (8, 4, 3, 3))], KWConfig()).shares[0])
    kw.set_temperature(layer, 1)
    static = nn.Conv2d(4, 8, 3)
    static.weight.copy_(layer.warehouse.cells.permute(1, 2, 0).reshape(8, 4, 3, 3))
    static.bias.copy_(layer.bias)
    x = torch.randn(3, 4, 7, 7)
    torch.testing.assert_close(layer(x), static(x))


@pytest.mark.usefixtures("each_choice")
@torch.no_grad()
def test_input_in_channels_last_gives_the_same():
    for case in ("padded", "pointwise", "depthwise"):
        _, layer, size = build(case)
        x = torch.randn(3, *size, dtype=torch.float64)
        out = layer.eval()(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(out, layer(x), rtol=1e-10, atol=1e-10)


def test_repr_names_sizes_and_warehouse():
    text = repr(pair()[0])
    assert "4, 8, kernel_size=(3, 3)" in text and "warehouse='shared'" in text
