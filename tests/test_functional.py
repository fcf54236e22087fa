"""The choices of how to compute a layer: all give what the plain one gives, and one is in force only where it should
be."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.distributed as dist
from helpers.implementations import FOLDED, OTHERS, PLAIN, SETTINGS, force
from helpers.selection import paired, representative
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import kw
from kw import KWConfig, functional
from kw.compute import IMPLEMENTATIONS

# Layer, input behind the batch: large and small in all, to meet every branch of an implementation.
LAYERS = {
    "3x3": (nn.Conv2d(8, 16, 3, padding=1), (8, 9, 7)),
    "3x3, wide": (nn.Conv2d(96, 128, 3, padding=1), (96, 3, 3)),
    "3x3, many positions": (nn.Conv2d(4, 4, 3, padding=1), (4, 20, 20)),
    "strided": (nn.Conv2d(8, 16, 3, stride=2, padding=1), (8, 9, 7)),
    "dilated": (nn.Conv2d(8, 16, 3, dilation=2), (8, 9, 7)),
    "patches": (nn.Conv2d(4, 16, 4, stride=4), (4, 8, 8)),
    "grouped": (nn.Conv2d(8, 16, 3, groups=4, padding="same"), (8, 9, 7)),
    "depthwise": (nn.Conv2d(16, 16, 7, groups=16, padding=3), (16, 9, 7)),
    "pointwise": (nn.Conv2d(8, 24, 1), (8, 9, 7)),
    "pointwise, wide": (nn.Conv2d(256, 512, 1), (256, 2, 2)),
    "pointwise, strided": (nn.Conv2d(8, 24, 1, stride=2), (8, 9, 7)),
    "pointwise, padded": (nn.Conv2d(8, 24, 1, padding=1), (8, 9, 7)),
    "pointwise, grouped": (nn.Conv2d(8, 24, 1, groups=2), (8, 9, 7)),
    "1d": (nn.Conv1d(8, 16, 3, padding=1), (8, 9)),
    "1d, pointwise": (nn.Conv1d(8, 16, 1, stride=2), (8, 9)),
    "3d": (nn.Conv3d(4, 8, 3, padding=1), (4, 3, 5, 4)),
    "3d, pointwise": (nn.Conv3d(4, 8, 1), (4, 3, 5, 4)),
    "linear": (nn.Linear(8, 24), (8,)),
    "linear on tokens": (nn.Linear(64, 24), (50, 64)),
}


pytestmark = pytest.mark.usefixtures("default_setting")


def dynamic(name, n):
    layer, size = LAYERS[name]
    static = nn.Sequential(copy.deepcopy(layer))
    model = kw.convert(static, {"0": "w"}, KWConfig(n=n, cell_in="1/2", cell_out="1/2")).double()
    kw.set_temperature(model, 0.2)
    return model, size


def computed(choice, model, x):
    """Output, and every gradient, of `model` computed by a choice."""
    x = x.clone().requires_grad_()
    with force(choice):
        out = model(x)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients = torch.autograd.grad(out, [x, *model.parameters()], cotangent)
    names = ["output", "input", *(name for name, _ in model.named_parameters())]
    return dict(zip(names, [out.detach(), *gradients], strict=True))


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():  # what is a millionth of the largest gradient may be zero but for rounding
        assert (actual[name] - value).abs().max() <= tolerance * max(value.abs().max(), 1e-6 * largest), name


BATCHES = [("1/2", 2), (1, 9), (4, 2), (4, 9)]  # budgets and samples
OF_TRITON = {"triton": ("1/2", 2), "triton folded": (4, 3)}  # one each, since its interpreter is slow
CASES = [
    (choice, name, of)
    for choice in OTHERS
    for name in LAYERS
    for of in ([OF_TRITON[choice]] if choice in OF_TRITON else BATCHES)
]


def each_choice_of_each_layer(choice, name, of):
    """Once, with budgets and batches in turn. Triton on every second layer, since folding is not its kernels' work, and
    on one of the wide ones, which take seconds."""
    turn = list(LAYERS).index(name) + OTHERS.index(choice)
    if choice in OF_TRITON:
        return turn % 2 == 0 and ("wide" not in name or (choice, name) == ("triton", "3x3, wide"))
    return of == BATCHES[turn % len(BATCHES)]


@pytest.mark.parametrize("choice, name, of", representative(CASES, each_choice_of_each_layer))
def test_every_choice_agrees_with_the_plain_one_in_output_and_gradients(choice, name, of):
    n, batch = of
    model, size = dynamic(name, n)
    x = torch.randn(batch, *size, dtype=torch.float64)
    assert_same(computed(choice, model, x), computed("grouped", model, x), 1e-9)


@pytest.mark.parametrize("name, choice", paired(LAYERS, [choice for choice in SETTINGS if choice != "triton folded"]))
@torch.no_grad()
def test_every_choice_serves_evaluation_of_one_sample_and_of_none(choice, name):
    model, size = dynamic(name, 1)
    x = torch.randn(3, *size, dtype=torch.float64)
    model.eval()
    with functional.use("grouped"):
        plain = model(x)
    with force(choice):
        torch.testing.assert_close(model(x[:1]), plain[:1], rtol=1e-9, atol=1e-9)
        assert model(x[:0]).shape == plain[:0].shape


WHOLE = [("resnet18", "1/4"), ("mobilenetv2_050", "1/2"), ("deit_tiny_patch16_224", 2)]


@pytest.mark.parametrize("backbone, n", representative(WHOLE, lambda backbone, n: backbone == "mobilenetv2_050"))
def test_every_choice_agrees_on_a_whole_backbone(backbone, n):
    size = {"img_size": 64} if "deit" in backbone else {}
    model = timm.create_model(f"kw_{backbone}", n=n, num_classes=10, **size).double()
    kw.set_temperature(model, 0.5)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)  # large enough that no BatchNorm blows up rounding
    plain = computed("grouped", model, x)
    for choice in OTHERS:
        if "triton" not in choice:  # its interpreter would take minutes
            assert_same(computed(choice, model, x), plain, 1e-9)


@pytest.mark.slow  # CI has a backbone by Triton in `make gpu DRY=1`
@pytest.mark.parametrize("choice", ["triton", "triton folded"])
def test_triton_agrees_on_a_narrow_backbone(choice):
    """With the strides, pointwise shortcuts and shared warehouses of ResNet18."""
    model = timm.create_model("kw_resnet18", n="1/2", num_classes=10, channels=(8, 8, 16, 16), layers=(1, 1, 1, 1))
    kw.set_temperature(model.double(), 0.5)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    assert_same(computed(choice, model, x), computed("grouped", model, x), 1e-9)


class Groups(TorchDispatchMode):
    """Collects the number of groups of each convolution."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.seen.append(args[8])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def plain():
    """Whether layers are computed plainly now: a convolution in which each of 3 samples is a group."""
    model, size = dynamic("pointwise", 1)
    with Groups() as groups:
        model(torch.randn(3, *size, dtype=torch.float64))
    return groups.seen == [3]


@pytest.fixture
def auto_multiplies(monkeypatch):
    """The small layers here are computed best by the plain one; so that the choice taken shows, "auto" has another."""
    monkeypatch.setattr(functional, "_remembered", lambda *_: functional.Choice("cells", "blocks"))


def test_auto_is_the_default(auto_multiplies):
    assert not plain()


def test_a_choice_within_a_block_ends_with_it(auto_multiplies):
    with functional.use("grouped"):
        assert plain()
        with functional.use("auto"):
            assert not plain()
        assert plain()
    assert not plain()


def test_a_choice_within_a_block_ends_with_it_after_an_error(auto_multiplies):
    with pytest.raises(KeyError), functional.use("grouped"):
        assert plain()
        raise KeyError
    assert not plain()


def test_a_choice_for_good_stays_until_it_is_taken_back(auto_multiplies):
    functional.set_default("grouped")
    assert plain()
    with functional.use("auto"):
        assert not plain()
    assert plain()
    functional.set_default()
    assert not plain()


def test_a_choice_within_a_block_is_that_threads_alone_and_one_for_good_is_all_threads(auto_multiplies):
    with ThreadPoolExecutor(1) as other:
        with functional.use("grouped"):
            assert plain() and not other.submit(plain).result()
        functional.set_default("grouped")
        assert plain() and other.submit(plain).result()


def test_blocks_of_several_threads_leave_nothing_behind_for_compiled_models():
    """Which follow the setting that was entered last: after all blocks, the default."""
    first, second = functional.use("grouped"), functional.use("batched")
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        other.submit(second.__exit__, None, None, None).result()
    assert functional._latest == functional.Setting()
    with functional.use("grouped"):
        functional.set_default("blocks")
    assert functional._latest == functional.Setting("blocks", "cells")


def test_how_kernels_are_made_can_be_chosen_alone(monkeypatch):
    """The cost model is then asked of these choices only."""
    asked = []
    monkeypatch.setattr(functional, "_remembered", lambda possible, *_: asked.append(possible) or possible[0])
    model, size = dynamic("3x3", 1)
    with functional.use(make="folded"):
        model(torch.randn(3, *size, dtype=torch.float64))
    with functional.use("blocks", make="auto"):
        model(torch.randn(3, *size, dtype=torch.float64))
    made, applied = asked
    assert {choice.make for choice in made} == {"folded"} and len(made) > 2
    assert {choice.apply for choice in applied} == {"blocks"}
    assert {choice.make for choice in applied} == {"cells", "folded"}


@pytest.mark.parametrize("arguments", [("fastest",), ("grouped", "fastest")])
@pytest.mark.parametrize("choose", [lambda *of: functional.use(*of).__enter__(), functional.set_default])
def test_an_unknown_choice_is_refused_with_the_known_ones_and_changes_nothing(arguments, choose):
    with functional.use("grouped"):
        with pytest.raises(ValueError) as error:
            choose(*arguments)
        known = IMPLEMENTATIONS if len(arguments) == 1 else ("cells", "folded")
        assert "'fastest'" in str(error.value) and all(name in str(error.value) for name in known)
        assert plain()


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "tanh"])
def test_attentions_that_are_not_affine_are_made_of_cells(function):
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    kw.convert(model, {"0": "w"}, KWConfig(n=1, attention_function=function)).double()
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64)
    for choice in FOLDED:
        assert_same(computed(choice, model, x), computed(PLAIN, model, x), 1e-9)


WITHOUT_TRITON = representative(SETTINGS, lambda choice: "triton" not in choice)  # whose interpreter is slow


@pytest.mark.parametrize("choice", WITHOUT_TRITON)
def test_data_parallel_training_has_the_same_gradients(choice, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model, size = dynamic("3x3", 1)
        x = torch.randn(4, *size, dtype=torch.float64)
        with force("grouped"):
            model(x).square().sum().backward()
        alone = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        with force(choice):
            DistributedDataParallel(model, gradient_as_bucket_view=True)(x).square().sum().backward()
        for parameter, grad in zip(model.parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("choice", WITHOUT_TRITON)
def test_half_precision_gradients_are_near_those_of_float32(choice):
    model, size = dynamic("3x3", 1)
    model, x = model.float(), torch.randn(4, *size)
    exact = computed(choice, model, x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = computed(choice, model, x)
    cells = next(name for name in exact if name.endswith("cells"))
    for name in ("output", "input", cells):  # the attention's own gradients pass a ReLU, whose sign rounding may turn
        assert (rough[name].float() - exact[name]).abs().max() <= 0.05 * exact[name].abs().max(), name


def test_no_more_than_a_block_of_kernels_is_kept_for_the_backward_pass():
    """What is saved is the input, the attentions and the cells; the plain one saves every sample's kernel too."""
    model, size = dynamic("3x3, wide", 1)
    x = torch.randn(8, *size, dtype=torch.float64)

    def saved(choice):
        sizes = {}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: (sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1],
                lambda t: t,
            ),
            force(choice),
        ):
            model(x)
        return sum(sizes.values())

    kernels = 8 * 96 * 128 * 9 * 8
    assert saved("grouped") > kernels > 4 * max(saved("blocks"), saved("triton"))
