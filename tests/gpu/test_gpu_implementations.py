"""Every implementation on a GPU: exact in each precision, under torch.compile, CUDA graphs, checkpointing and DDP.

Needs torch, triton, timm and pytest alone.
"""

import copy
import math

import pytest
import timm
import torch
import torch.distributed as dist
from helpers.implementations import OTHERS, REMADE, force
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import kw
from kw import KWConfig
from kw.compute import IMPLEMENTATIONS, MAKES, Geometry
from kw.compute.cost import applies

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("default_setting")]

# One layer: kernel size, stride, padding, dilation; cells across the output's and the input's channels, channels of a
# cell (o, i); input positions; and terms of the kernels' sum.
LAYERS = {
    "3x3": ((3, 3), 1, 1, 1, (2, 2), (32, 32), (14, 14), 5),
    "3x3, blocks of 128": ((3, 3), 1, 1, 1, (2, 2), (128, 64), (28, 28), 9),
    "3x3, last stage": ((3, 3), 1, 1, 1, (2, 2), (64, 64), (7, 7), 40),
    "3x3, strided": ((3, 3), 2, 1, 1, (2, 1), (64, 64), (28, 28), 5),
    "3x3, dilated": ((3, 3), 1, 2, 2, (2, 3), (16, 16), (9, 7), 5),
    "3x3, strided and dilated": ((3, 3), (2, 3), (1, 2), (3, 2), (2, 2), (16, 16), (13, 17), 5),
    "odd numbers": ((3, 2), (1, 2), (2, 0), 1, (3, 2), (5, 3), (11, 8), 5),
    "stem": ((7, 7), 2, 3, 1, (2, 1), (32, 3), (32, 32), 5),
    "patches": ((4, 4), 4, 0, 1, (2, 2), (48, 16), (16, 16), 5),
    "pointwise": ((1, 1), 1, 0, 1, (2, 1), (64, 64), (14, 14), 9),
    "pointwise, several input cells": ((1, 1), 1, 0, 1, (2, 4), (64, 64), (14, 14), 9),
    "pointwise, strided": ((1, 1), 2, 0, 1, (2, 2), (64, 64), (15, 14), 9),
    "1d": ((3,), 2, 1, 1, (2, 2), (32, 16), (50,), 5),
    "tokens": ((1,), 1, 0, 1, (3, 1), (64, 192), (197,), 9),
}
DRY_LAYERS = {"odd numbers", "1d"}

# Precision, whether TF32 is allowed, and the relative error (in the 2-norm) that rounding explains. Half precision: of
# kernels and results; TF32 has 10 bits, and each product rounds once.
PRECISIONS = {
    "float64": (torch.float64, False, 1e-12),
    "float32": (torch.float32, False, 4e-6),
    "float32, TF32": (torch.float32, True, 4 * 2**-10),
    "bfloat16": (torch.bfloat16, False, 8 * 2**-8),
    "float16": (torch.float16, False, 8 * 2**-11),
}


def layer(name, batch, own, device):
    """Input, weights, basis (of each mixture's own, or shared) in float64, and geometry."""
    kernel, stride, padding, dilation, (rows, columns), (o, i), space, terms = LAYERS[name]
    dims = len(kernel)
    sizes = (value if isinstance(value, tuple) else (value,) * dims for value in (stride, padding, dilation))
    geometry = Geometry((math.prod(kernel), rows, columns), kernel, *sizes)
    mixtures = (geometry.mixtures,) if own else ()
    shapes = (batch, columns * i, *space), (batch, geometry.mixtures, terms), (terms, *mixtures, o, i)
    x, weights, basis = (torch.randn(shape, device=device, dtype=torch.float64) for shape in shapes)
    return x, weights / math.sqrt(terms), basis / math.sqrt(geometry.grid[0] * columns * i), geometry


def computed(name, x, weights, basis, geometry):
    tensors = [t.detach().requires_grad_() for t in (x, weights, basis)]
    out = IMPLEMENTATIONS[name](*tensors, geometry)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    return dict(
        zip(("output", "x", "weights", "basis"), [out, *torch.autograd.grad(out, tensors, cotangent)], strict=True)
    )


def last(x):
    """Channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def error(value, exact):
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_float64_but_for_rounding(name, precision, device, dry, tf32):
    """All implementations, made of cells and folded, channels first and last; all failures are reported at once."""
    if dry and name not in DRY_LAYERS:
        pytest.skip("too large for the interpreter")
    dtype, allowed, tolerance = PRECISIONS[precision]
    tf32(allowed)
    wrong = []
    for make in MAKES:
        *tensors, geometry = layer(name, 2 if dry else 5, make == "folded", device)
        rounded = [t.to(dtype) for t in tensors]
        exact = computed("grouped", *(t.double() for t in rounded), geometry)
        for implementation in IMPLEMENTATIONS:
            if not applies(implementation, make, rounded[0], geometry):
                continue
            for order, x in (("first", rounded[0]), ("last", last(rounded[0]))):
                found = computed(implementation, x, *rounded[1:], geometry)
                errors = {key: error(value, exact[key]) for key, value in found.items()}
                # "inputs" leaves sums over taps and cells to autograd, in the input's precision.
                most = tolerance * (3 if implementation == "inputs" else 1)
                wrong += [
                    f"{implementation} of {make}, channels {order}: {key} is off by {value:.2g}"
                    for key, value in errors.items()
                    if not value <= most
                ]
    assert not wrong, f"at most {tolerance:.2g} is allowed:\n" + "\n".join(wrong)


def test_triton_is_among_what_applies(device):
    """Lest the tests above pass by leaving it out."""
    *tensors, geometry = layer("3x3", 2, False, device)
    assert applies("triton", "cells", tensors[0].bfloat16(), geometry)


@pytest.mark.no_dry
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("make", MAKES)
def test_a_batch_of_more_numbers_than_32_bits_count(make, order, device):
    """Input, output and both gradients have over 2**31 numbers each; the last samples are what they are alone."""
    batch, channels, size = 2100, 16, 256
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of free memory")
    geometry = Geometry((9, 2, 2), (3, 3), (1, 1), (1, 1), (1, 1))
    x = torch.randn(batch, channels, size, size, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if order == "last" else x
    weights = torch.randn(batch, geometry.mixtures, 3, device=device, dtype=torch.bfloat16)
    basis = torch.randn((3, *((geometry.mixtures,) if make == "folded" else ()), 8, 8), device=device).bfloat16()
    assert x.numel() > 2**31

    def gradient(x, weights):
        x = x.detach().requires_grad_()
        out = IMPLEMENTATIONS["triton"](x, weights, basis, geometry)
        (grad,) = torch.autograd.grad(out, x, out.detach())
        return out[-2:].detach(), grad[-2:]

    few = gradient(x[-2:], weights[-2:])
    for value, other in zip(gradient(x, weights), few, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-2 * other.abs().max().item())


# A small model


class Small(nn.Module):
    """Layers of every kind that share warehouses, as a backbone has them."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(8, width, 3, padding=1)
        self.layers = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.point = nn.Conv2d(2 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, width)

    def forward(self, x):
        x = self.stem(x).relu()
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(self.point(self.down(x)).mean((2, 3)))


@pytest.fixture
def small(device, dry, tf32):
    tf32(False)
    model = Small(4 if dry else 32)
    scope = {"layers.0": "a", "layers.1": "a", "down": "b", "point": "c", "head": "d"}
    kw.convert(model, scope, KWConfig(n=2, cell_in="1/2", cell_out="1/2"))
    kw.set_temperature(model, 0.3)
    return model.to(device), torch.randn(2 if dry else 6, 8, *((4, 5) if dry else (9, 10)), device=device)


def grads_of(model, x, setting, call=None):
    model.zero_grad()
    with force(setting):
        out = (model if call is None else call)(x)
    out.square().sum().backward()
    return [out.detach().clone(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_near(found, expected, tolerance=2e-4):
    errors = [error(value, other.double()) for value, other in zip(found, expected, strict=True)]
    assert all(value <= tolerance for value in errors), errors


@pytest.mark.parametrize("setting", ["auto", "triton", "triton folded"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_and_evaluates_the_same(mode, setting, small, dry):
    """In float64: the norms over a small batch multiply rounding, which the compiler's order of operations changes."""
    if dry and (mode, setting) != ("default", "triton folded"):
        pytest.skip("one is enough on a CPU")
    model, x = (value.double() for value in small)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager") if dry else torch.compile(model, mode=mode)
    for _ in range(1 if dry else 4):  # CUDA graphs are recorded in the second call, and replayed from the third on
        x = torch.randn_like(x)
        assert_near(grads_of(model, x, setting, compiled), grads_of(model, x, setting), 1e-8)
    model.eval()
    for _ in range(1 if dry else 4):
        x = torch.randn_like(x)
        with torch.no_grad(), force(setting):
            assert_near([compiled(x).clone()], [model(x)], 1e-8)


@pytest.mark.no_dry
def test_compiling_an_evaluation_makes_a_cuda_graph_of_it(small):
    """torch says how often it had to do without one."""
    model, x = small
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model.eval(), mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            compiled(x)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.no_dry
@pytest.mark.parametrize("setting", ["auto", "triton", "triton folded", "batched"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_an_evaluation_can_be_captured_as_a_cuda_graph(half, setting, small):
    model, x = small
    model.eval()
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False)
    with torch.inference_mode(), force(setting), autocast:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert_near([out.float()], [model(x).float()], 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("setting", REMADE)
def test_a_checkpoint_repeats_the_setting_of_a_block_that_has_ended(setting, reentrant, small):
    model, x = small

    def checkpointed(x):
        x = model.stem(x)
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return model.head(model.point(model.down(x.relu())).mean((2, 3)))

    plain = grads_of(model, x, "grouped", checkpointed)
    assert_near(grads_of(model, x, setting, checkpointed), plain)  # its backward pass comes after the block


@pytest.mark.parametrize("setting", ["auto", "triton", "triton folded"])
def test_activation_checkpointing_under_autocast_changes_nothing(setting, small, device):
    """To the bit: the forward pass is repeated within the backward pass, in the same precision."""
    model, x = small

    def call(x, function):
        with torch.autocast(device.type, torch.bfloat16):
            return function(x).float()

    plain = grads_of(model, x, setting, lambda x: call(x, model))
    found = grads_of(model, x, setting, lambda x: call(x, lambda x: checkpoint(model, x, use_reentrant=False)))
    assert all(torch.equal(value, other) for value, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("setting", ["auto", "triton", "triton folded"])
def test_data_parallel_training_has_the_same_gradients(setting, small, device, dry, tmp_path):
    model, x = small
    expected = grads_of(model, x, setting)
    backend = "gloo" if dry else "nccl"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        for _ in range(2):
            assert_near(grads_of(model, x, setting, wrapped), expected, 1e-5)
    finally:
        dist.destroy_process_group()


def test_a_side_stream_sees_what_it_should(small, dry):
    """Nothing is computed on another stream than torch's current one."""
    if dry:
        pytest.skip("a CPU has no streams")
    model, x = small
    expected = grads_of(model, x, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = grads_of(model, x, "triton")
    stream.synchronize()
    assert_near(found, expected, 1e-6)


# Whole models, which take longest

BACKBONES = {  # budget, and what makes it tiny in a dry run
    "resnet18": ("1/4", {"channels": [8, 8, 8, 16], "stem_width": 8, "layers": [1, 1, 1, 1]}),
    "resnet50": (1, {"channels": [8, 8, 8, 16], "stem_width": 8, "layers": [1, 1, 1, 1]}),
    "convnext_tiny": (1, {"depths": (1, 1, 1, 1), "dims": (16, 16, 16, 32)}),
    "mobilenetv2_100": (4, {}),
    "deit_tiny_patch16_224": (4, {"depth": 1}),
}


def backbone(name, device, dry):
    """It has enough positions in its last stage that BatchNorm does not multiply rounding."""
    n, tiny = BACKBONES[name]
    size = 64 if dry else 128
    more = {"img_size": size} if "deit" in name else {}
    model = timm.create_model(f"kw_{name}", n=n, num_classes=10, **more, **(tiny if dry else {})).to(device)
    kw.set_temperature(model, 0.5)
    return model, torch.randn(4 if dry else 8, 3, size, size, device=device)


def gradients(model, x, setting):
    """Logits, and every gradient, computed by a setting."""
    with force(setting):
        out = model(x)
        loss = F.cross_entropy(out.double(), torch.arange(len(x), device=x.device) % 10)
        found = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {"output": out.detach(), **dict(zip(names, found, strict=True))}


def off(found, exact):
    """The error of all gradients as one vector, and of the output."""
    names = [name for name in exact if name != "output"]
    vectors = [torch.cat([values[name].double().flatten() for name in names]) for values in (found, exact)]
    return max(error(*vectors), error(found["output"], exact["output"]))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_the_same_whatever_computes_it(name, device, dry, tf32):
    if dry and name != "resnet18":
        pytest.skip("one is enough on a CPU")
    tf32(False)
    model, x = backbone(name, device, dry)
    model, x = model.double(), x[:2, :, :32, :32].double() if dry else x.double()
    exact = gradients(model, x, "grouped")
    settings = ("triton folded",) if dry else ("auto", *OTHERS)
    errors = {setting: off(gradients(model, x, setting), exact) for setting in settings}
    assert all(value <= 1e-8 for value in errors.values()), errors


@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, "last"), (torch.float16, "first")])
@pytest.mark.parametrize("name", BACKBONES)
def test_under_autocast_a_backbone_is_about_as_exact_as_the_plain_implementation(name, dtype, channels, device, dry):
    """In evaluation mode, since batch norms in training multiply rounding, in MobileNet until no gradient is left."""
    if dry and (name, channels) != ("resnet18", "last"):
        pytest.skip("one is enough on a CPU")
    model, x = backbone(name, device, dry)
    for norm in model.modules():
        if hasattr(norm, "momentum"):
            norm.momentum = None  # the mean of all batches so far
    with torch.no_grad(), force("grouped"):
        model(x)
    model.eval()
    exact = gradients(copy.deepcopy(model).double(), x.double(), "grouped")
    if channels == "last":
        model, x = (value.to(memory_format=torch.channels_last) for value in (model, x))
    with torch.autocast(device.type, dtype):
        plain = off(gradients(model, x, "grouped"), exact)
        settings = ("blocks folded",) if dry else ("auto", *OTHERS)
        errors = {setting: off(gradients(model, x, setting), exact) for setting in settings}
    assert all(value <= 1.5 * plain + 1e-3 for value in errors.values()), (plain, errors)
