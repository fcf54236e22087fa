"""The implementations from within: any shape, cut into blocks, runs of strips, and one sum for the gradients of a
warehouse."""

import copy
import dataclasses
import gc
import math
import random
import subprocess
import sys
import weakref
from itertools import product

import pytest
import torch
import torch.distributed as dist
from helpers.implementations import OTHERS, REMADE, SETTINGS, force
from helpers.programs import ROOT
from helpers.selection import paired, representative
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import kw
from kw import KWConfig, functional
from kw.compute import IMPLEMENTATIONS, Geometry, blocks, gathering, grouped, mixing, operator, samples, stand_in
from kw.compute.cost import Choice
from kw.compute.strips import Strips

pytestmark = pytest.mark.usefixtures("default_setting")


def any_geometry(rng):
    """A convolution of 1 to 3 dimensions and an input that is large enough for it."""
    dims = rng.choice((1, 2, 2, 3))
    kernel, stride, dilation = (tuple(rng.randint(1, 3) for _ in range(dims)) for _ in range(3))
    padding = tuple(rng.randint(0, 3) for _ in range(dims))
    least = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    space = tuple(max(size, 1) + rng.randint(0, 4) for size in least)
    return Geometry((math.prod(kernel), 2, 3), kernel, stride, padding, dilation), space


def gradients(name, x, weights, basis, geometry):
    out = IMPLEMENTATIONS[name](x, weights, basis, geometry)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, (x, weights, basis), cotangent)]


def case(number, last, terms=5, own=False, dtype=torch.float64):
    """Input, weights, basis (of each mixture's own, or shared) and geometry."""
    geometry, space = any_geometry(random.Random(number))
    o, i = 4, 2
    x = torch.randn(3, 3 * i, *space)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    mixtures = (geometry.mixtures,) if own else ()
    tensors = (x, torch.randn(3, geometry.mixtures, terms), torch.randn(terms, *mixtures, o, i))
    return *(tensor.to(dtype).requires_grad_() for tensor in tensors), geometry


LAID_OUT = product(["cells", "folded"], ["channels first", "channels last"], ["whole", "rows", "samples", "both"])


@pytest.mark.parametrize("number, laid_out", paired(range(12), LAID_OUT))
def test_any_shape_in_any_blocks(number, laid_out, monkeypatch):
    made, layout, cut = laid_out
    own, last = made == "folded", layout == "channels last"
    if cut != "whole":  # so few entries that a block is a row of a sample, some samples, or less
        monkeypatch.setattr(blocks, "ROWS", 1)
        monkeypatch.setattr(mixing, "PIECE", 1 if cut == "both" else 30)
        monkeypatch.setattr(blocks, "ENTRIES", {"rows": 500, "samples": 1, "both": 100}[cut])
        monkeypatch.setattr(blocks, "ENTRIES_OF_SAMPLES", 1)
    terms = 200 if cut == "samples" else 5  # more cells than mixtures: samples are cut
    *tensors, geometry = case(number, last, terms, own)
    expected = gradients("grouped", *tensors, geometry)
    for name in ("blocks",) if own else ("blocks", "inputs"):
        for value, other in zip(gradients(name, *tensors, geometry), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-9)


# The first six differ in layout, in how kernels are made, and in how many samples are taken at a time.
@pytest.mark.parametrize("number", representative(range(16), lambda number: number < 6))
def test_any_shape_by_some_samples_at_a_time(number, monkeypatch):
    """Triton's kernels (not for three dimensions), and batched products over an unfolded input."""
    last, own, some = number % 2 == 0, number // 2 % 2 == 0, 1 + number % 3  # one to all three samples at a time
    *tensors, geometry = case(number, last, own=own)
    monkeypatch.setattr(samples, "ENTRIES", some * geometry.mixtures * 8)
    expected = gradients("grouped", *tensors, geometry)
    for name in ("batched",) if len(geometry.kernel_size) == 3 else ("batched", "triton"):
        for value, other in zip(gradients(name, *tensors, geometry), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number, dtype", paired([1, 4, 6], [torch.float32, torch.bfloat16, torch.float16]))
def test_triton_sums_in_float32_whatever_comes_in(number, dtype):
    """Against float64 of the same rounded numbers: off by what rounding the result costs, and no more."""
    *tensors, geometry = case(number, last=True, dtype=dtype)
    exact = gradients("grouped", *(t.detach().double().requires_grad_() for t in tensors), geometry)
    found = gradients("triton", *tensors, geometry)
    rounding = 4 * torch.finfo(dtype).eps  # of the result, and of the kernels in between
    for value, other in zip(found, exact, strict=True):
        assert value.dtype == dtype
        assert (value.double() - other).norm() <= rounding * other.norm()


@pytest.mark.parametrize("name", ["blocks", "triton"])
def test_what_an_implementation_writes_has_the_layout_of_its_input(name):
    """Channels last stay last, in the output and in the gradient of the input; other strides become contiguous."""
    geometry = Geometry((9, 2, 2), (3, 3), (1, 1), (1, 1), (1, 1))
    weights, basis = torch.randn(2, 36, 5), torch.randn(5, 4, 3)
    x = torch.randn(2, 6, 5, 7)
    for source in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        source = source.detach().requires_grad_()
        out = IMPLEMENTATIONS[name](source, weights, basis, geometry)
        (grad,) = torch.autograd.grad(out.square().sum(), source)
        last = source.stride(1) == 1
        for made in (out, grad):
            assert made.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        expected = IMPLEMENTATIONS["grouped"](source, weights, basis, geometry)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), source)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("own", [False, True], ids=["cells", "folded"])
def test_torch_accepts_the_operator(own, dtype):
    """Its schema, its fake tensors and its gradients, as torch.compile needs them."""
    for name in ("blocks", "triton"):
        *tensors, geometry = case(4, last=False, own=own, dtype=dtype)
        torch.library.opcheck(operator._forward, (*tensors, name, *dataclasses.astuple(geometry)))


@pytest.mark.parametrize("number", range(12))
def test_runs_of_a_strip_are_what_a_convolution_reads(number):
    """Against torch's unfold, by its definition: for each tap, the input positions of all outputs."""
    geometry, space = any_geometry(random.Random(number))
    x = torch.arange(1.0, 1 + math.prod(space)).view(1, 1, *space)
    padded = F.pad(x, [side for pad in reversed(geometry.padding) for side in (pad, pad)])
    strips = Strips(space, geometry)
    laid = strips.lay(x)
    for number, tap in enumerate(strips.taps):
        at = torch.unravel_index(torch.tensor(number), geometry.kernel_size)
        reads = padded[0, 0]
        for dim, (first, d, step, size) in enumerate(
            zip(at, geometry.dilation, geometry.stride, strips.out, strict=True)
        ):
            reads = reads.index_select(dim, first * d + step * torch.arange(size))
        assert torch.equal(strips.outputs(strips.reads(laid, tap))[0, 0], reads)


def test_pointwise_layers_read_their_input_where_it_lies():
    geometry = Geometry((1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1))
    x = torch.randn(2, 4, 5, 6)
    (strip,) = Strips((5, 6), geometry).lay(x).values()
    assert strip.data_ptr() == x.data_ptr()


class Shared(nn.Module):
    """Three layers of one warehouse."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)))
        kw.convert(self, lambda name, layer: "w" if "layers." in name else None, KWConfig(n=2))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def shared():
    torch.manual_seed(0)
    return Shared().double(), torch.randn(2, 6, 5, 5, dtype=torch.float64)


def grads_of(model, x, choice="blocks"):
    model.zero_grad()
    with force(choice):
        model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(actual, expected):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.fixture
def totals(monkeypatch):
    """What the backward passes of layers added the gradient of their cells to: a sum, or None for one of their own."""
    seen = []
    monkeypatch.setattr(operator, "sum_of", lambda cells: seen.append(gathering.sum_of(cells)) or seen[-1])
    return seen


def sums(model):
    """What gradients of cells are waiting to be fetched."""
    return model.warehouses["w"]().grad_fn.sums


def test_gradients_of_a_warehouse_are_one_sum_and_are_the_plain_ones(shared, totals):
    model, x = shared
    expected = grads_of(model, x, "grouped")
    assert_equal(grads_of(model, x), expected)
    assert len(totals) == 3 and all(total is totals[0] is not None for total in totals)
    assert_equal(grads_of(model, x), expected)  # a second step starts from zero
    assert not sums(model)


def test_layers_computed_by_different_choices_add_up(shared, monkeypatch):
    model, x = shared
    expected = grads_of(model, x, "grouped")
    taken = iter((("cells", "blocks"), ("folded", "grouped"), ("cells", "triton")) * 2)
    monkeypatch.setattr(functional, "_remembered", lambda *_: Choice(*next(taken)))
    assert_equal(grads_of(model, x, "auto"), expected)


def test_gradients_accumulate_over_two_backward_passes_and_over_one_of_two_forward_passes(shared):
    model, x = shared
    expected = {name: 2 * value for name, value in grads_of(model, x, "grouped").items()}
    model.zero_grad()
    with functional.use("blocks"):
        for _ in range(2):
            model(x).square().sum().backward()
        twice = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        (model(x).square().sum() + model(x).square().sum()).backward()
        at_once = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_equal(twice, expected)
    assert_equal(at_once, expected)


def test_a_pass_for_the_input_alone_leaves_nothing_behind(shared, totals):
    model, x = shared
    with functional.use("blocks"):
        x = x.clone().requires_grad_()
        torch.autograd.grad(model(x).square().sum(), x)
    assert totals[0] is not None and not sums(model)
    assert_equal(grads_of(model, x.detach()), grads_of(model, x.detach(), "grouped"))


def test_a_pass_that_fails_leaves_nothing_for_the_next(shared):
    model, x = shared
    expected = grads_of(model, x, "grouped")
    waiting = sums(model)

    def fail(grad):
        raise MemoryError

    with functional.use("blocks"), pytest.raises(MemoryError):
        hidden = model.layers[0](x)
        hidden.register_hook(fail)
        model.layers[1:](hidden).square().sum().backward()
    assert waiting  # what the last layers added
    assert_equal(grads_of(model, x), expected)
    assert not waiting


def test_under_autocast_the_sum_is_of_float32(shared, totals):
    model, x = shared
    model, x = model.float(), x.float()
    expected = grads_of(model, x)
    totals.clear()
    model.zero_grad()
    with functional.use("blocks"), torch.autocast("cpu", torch.bfloat16):
        model(x).square().sum().backward()
    assert len(totals) == 3 and all(total.dtype == torch.float32 for total in totals)
    cells = next(name for name, _ in model.named_parameters() if name.endswith("warehouse.cells"))
    grad = model.get_parameter(cells).grad
    assert (grad - expected[cells]).abs().max() <= 0.1 * expected[cells].abs().max()


def test_data_parallel_layers_of_a_warehouse_have_the_same_gradients(shared, tmp_path):
    model, x = shared
    expected = grads_of(model, x, "grouped")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model.zero_grad()
        with functional.use("blocks"):
            DistributedDataParallel(model)(x).square().sum().backward()
    finally:
        dist.destroy_process_group()
    assert_equal({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def test_a_moved_model_does_not_hold_its_old_memory(shared):
    model, x = shared
    grads_of(model, x)
    old = weakref.ref(model.warehouses["w"]())
    model.zero_grad()
    model.float()
    gc.collect()
    assert old() is None


# What compiling asks of Triton's operator is also in `test_torch_accepts_the_operator`, where it takes less time.
@pytest.mark.parametrize(
    "choice", representative(["auto", "blocks", "triton folded"], lambda choice: choice == "blocks")
)
def test_a_compiled_model_trains_on_batches_of_several_sizes(shared, choice):
    model, x = shared[0], torch.randn(4, 6, 5, 5, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (4, 3, 2) if "triton" not in choice else (3, 2):  # its interpreter is slow
        expected = grads_of(model, x[:batch], "grouped")
        model.zero_grad()
        with force(choice):
            compiled(x[:batch]).square().sum().backward()
        assert_equal({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def test_a_trained_model_can_be_traced(shared):
    model, x = shared
    grads_of(model, x)
    model.eval()
    with functional.use("grouped"):
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("choice", SETTINGS[1:])
def test_an_input_too_small_for_the_kernel_is_refused_whatever_the_choice(choice):
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    kw.convert(model, {"0": "w"})
    with force(choice), pytest.raises((ValueError, RuntimeError), match=r"(?i)kernel"):
        model.eval()(torch.randn(2, 4, 5, 2))


OFTEN = {("blocks", False), ("blocks folded", True), ("triton", True)}


@pytest.mark.parametrize("choice, reentrant", representative(product(REMADE, [False, True]), lambda *of: of in OFTEN))
def test_checkpointed_parts_have_the_same_sum(shared, choice, reentrant):
    """A reentrant checkpoint is a backward pass within a backward pass."""
    model, x = shared
    expected = grads_of(model, x, "grouped")
    model.zero_grad()
    with force(choice):
        checkpointed(model, x, reentrant).square().sum().backward()
    assert_equal({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def checkpointed(model, x, reentrant=False):
    first, *others = model.layers
    out = first(x)
    for layer in others:
        out = checkpoint(layer, out, use_reentrant=reentrant)
    return out


WITHOUT_TRITON = representative(OTHERS, lambda choice: "triton" not in choice)  # whose interpreter is slow


@pytest.mark.parametrize("reentrant", representative([False, True], lambda reentrant: not reentrant))
@pytest.mark.parametrize("choice", WITHOUT_TRITON)
def test_a_backward_pass_after_the_block_repeats_what_the_forward_pass_did(shared, choice, reentrant):
    """Activation checkpointing computes layers again, outside of the `with` block: by the choice of the first time. A
    pass without gradients in between, by another choice, does not change that."""
    model, x = shared
    expected = grads_of(model, x, "grouped")
    model.zero_grad()
    with force(choice):
        out = checkpointed(model, x, reentrant)
    with torch.no_grad(), force("grouped"):
        model.eval()(x)
        model.train()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        compute = functional.compute
        patch.setattr(functional, "compute", lambda *of: seen.append(of[4]) or compute(*of))
        out.square().sum().backward()
    assert seen and set(seen) == {choice.split()[0]}
    assert_equal({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def test_copies_and_moved_models_have_sums_of_their_own(shared):
    model, x = shared
    expected = grads_of(model, x)
    copied = copy.deepcopy(model)
    assert_equal(grads_of(copied, x), expected)
    assert copied.warehouses["w"]().is_set_to(copied.warehouses["w"].cells)
    with torch.no_grad():
        copied.warehouses["w"].cells.mul_(2)  # in place, as an optimizer does
    assert_equal(grads_of(copied, x), grads_of(copied, x, "grouped"))
    moved = copied.float().double()
    assert_equal(grads_of(moved, x), grads_of(moved, x, "grouped"))
    moved.warehouses["w"].cells = nn.Parameter(
        moved.warehouses["w"].cells.detach()
    )  # another parameter, of old numbers
    assert_equal(grads_of(moved, x), grads_of(moved, x, "grouped"))


def test_without_torchs_private_calls_autograd_adds_up_the_same_gradients(shared, monkeypatch):
    model, x = shared
    expected = grads_of(model, x, "grouped")
    monkeypatch.setattr(gathering, "AVAILABLE", False)
    assert model.warehouses["w"]() is model.warehouses["w"].cells
    for setting in ("blocks", "blocks folded"):
        assert_equal(grads_of(model, x, setting), expected)


def test_kw_imports_and_trains_where_torch_does_not_have_the_private_calls():
    code = """
import torch
call = torch._C._current_graph_task_id
del torch._C._current_graph_task_id
import kw
torch._C._current_graph_task_id = call  # torch's own checkpointing calls it
from torch import nn

assert not kw.compute.gathering.AVAILABLE
torch.manual_seed(0)
model = kw.convert(nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))), {"0": "w", "1": "w"}).double()
x = torch.randn(3, 6, 5, 5, dtype=torch.float64)
grads = {}
for name in ("grouped", "blocks"):
    with kw.functional.use(name):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
    grads[name] = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
for expected, found in zip(grads["grouped"], grads["blocks"], strict=True):
    torch.testing.assert_close(found, expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_frozen_cells_get_no_gradient_and_the_others_do(shared):
    model, x = shared
    model.warehouses["w"].cells.requires_grad_(False)
    with functional.use("blocks"):
        model(x).square().sum().backward()
    assert model.warehouses["w"].cells.grad is None
    assert all(p.grad is not None for name, p in model.named_parameters() if "warehouse" not in name)


def test_a_gradient_of_a_gradient_is_refused_or_taken_by_the_plain_choice(shared):
    model, x = shared
    x = x.clone().requires_grad_()
    with functional.use("blocks"), pytest.raises(RuntimeError, match=r'use\("grouped"\)'):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with functional.use("grouped"):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("choice, of", paired(OTHERS, product([0, 1, 3], [1, 2, 8])))
def test_gradients_of_any_batch_and_groups(choice, of):
    batch, groups = of
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups))
    kw.convert(model, {"0": "w"}, KWConfig(n=2, attention_norm="layer")).double()
    x = torch.randn(batch, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    tensors = [x, *model.parameters()]
    with functional.use("grouped"):
        expected = torch.autograd.grad(model(x).square().sum(), tensors)
    with force(choice):
        for value, other in zip(torch.autograd.grad(model(x).square().sum(), tensors), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("choice", "times"), [("blocks", 1.5), ("triton", 2), ("inputs", 2)])
def test_half_precision_is_about_as_exact_as_the_plain_choice(choice, times):
    """Errors of output and gradients against float64, with sums over nine taps and four input groups. "inputs" leaves
    the sum over taps to autograd, in half precision; Triton's interpreter cuts bfloat16 off where a GPU rounds."""
    geometry = Geometry((9, 2, 4), (3, 3), (1, 1), (1, 1), (1, 1))
    x, alpha, cells = torch.randn(4, 64, 8, 8), torch.randn(4, geometry.mixtures, 7) / 3, torch.randn(7, 16, 16)
    tensors = [t.bfloat16().requires_grad_() for t in (x, alpha, cells)]
    exact = gradients("grouped", *(t.detach().double().requires_grad_() for t in tensors), geometry)
    for value, plain, true in zip(
        gradients(choice, *tensors, geometry), gradients("grouped", *tensors, geometry), exact, strict=True
    ):
        assert (value.double() - true).square().mean() <= times**2 * (plain.double() - true).square().mean()


@pytest.mark.parametrize("grid", [(9, 1, 1), (4, 3, 1), (4, 1, 3), (9, 2, 5), (1, 3, 2)])
def test_kernels_for_onnx_are_those_of_every_other_use(grid):
    """Recorded for ONNX, their axes are moved in another order."""
    mixtures = torch.randn(2, math.prod(grid), 4, 2)
    plain = grouped.assemble_mixtures(mixtures, grid)
    with stand_in.recorded():
        torch.testing.assert_close(grouped.assemble_mixtures(mixtures, grid), plain, rtol=0, atol=0)
