"""The ways to compute a layer: all give what the plain one gives, and choosing one is undone where it should be."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import kw
from kw import KWConfig, functional
from kw.ways import cost

OTHERS = [way for way in functional.WAYS if way != "grouped"]

# Layer, input behind the batch: large and small in channels, positions and kernel, to meet a way's every branch.
LAYERS = {
    "3x3": (nn.Conv2d(8, 16, 3, padding=1), (8, 9, 7)),
    "3x3, wide": (nn.Conv2d(96, 128, 3, padding=1), (96, 3, 3)),
    "3x3, many positions": (nn.Conv2d(4, 4, 3, padding=1), (4, 40, 40)),
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


@pytest.fixture(autouse=True)
def default_way():
    yield
    functional.use("auto")


def dynamic(name, n):
    layer, size = LAYERS[name]
    static = nn.Sequential(copy.deepcopy(layer))
    model = kw.convert(static, {"0": "w"}, KWConfig(n=n, cell_in="1/2", cell_out="1/2")).double()
    kw.set_temperature(model, 0.2)
    return model, size


def computed(way, model, x):
    """Output, and every gradient, of `model` computed the given way."""
    x = x.clone().requires_grad_()
    with functional.use(way):
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


@pytest.mark.parametrize("batch", [2, 9])
@pytest.mark.parametrize("n", ["1/2", 1, 4])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", OTHERS)
def test_every_way_agrees_with_the_plain_one_in_output_and_gradients(way, name, n, batch):
    model, size = dynamic(name, n)
    x = torch.randn(batch, *size, dtype=torch.float64)
    assert_same(computed(way, model, x), computed("grouped", model, x), 1e-9)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", functional.WAYS)
@torch.no_grad()
def test_every_way_serves_evaluation_of_one_sample_and_of_none(way, name):
    model, size = dynamic(name, 1)
    x = torch.randn(3, *size, dtype=torch.float64)
    model.eval()
    with functional.use("grouped"):
        plain = model(x)
    with functional.use(way):
        torch.testing.assert_close(model(x[:1]), plain[:1], rtol=1e-9, atol=1e-9)
        assert model(x[:0]).shape == plain[:0].shape


@pytest.mark.parametrize(
    ("backbone", "n"), [("resnet18", "1/4"), ("mobilenetv2_050", "1/2"), ("deit_tiny_patch16_224", 2)]
)
def test_every_way_agrees_on_a_whole_backbone(backbone, n):
    size = {"img_size": 64} if "deit" in backbone else {}
    model = timm.create_model(f"kw_{backbone}", n=n, num_classes=10, **size).double()
    kw.set_temperature(model, 0.5)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)  # large enough that no BatchNorm blows up rounding
    plain = computed("grouped", model, x)
    for way in OTHERS:
        assert_same(computed(way, model, x), plain, 1e-9)


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
    """Whether layers are computed the plain way now: a convolution in which each of 3 samples is a group."""
    model, size = dynamic("pointwise", 1)
    with Groups() as groups:
        model(torch.randn(3, *size, dtype=torch.float64))
    return groups.seen == [3]


@pytest.fixture
def auto_multiplies(monkeypatch):
    """The small layers here are best computed the plain way; so that the way taken shows, "auto" has another."""
    monkeypatch.setattr(functional, "_remembered", lambda *_: "multiply")


def test_auto_is_the_default(auto_multiplies):
    assert not plain()


def test_a_way_chosen_in_a_block_ends_with_it(auto_multiplies):
    with functional.use("grouped"):
        assert plain()
        with functional.use("auto"):
            assert not plain()
        assert plain()
    assert not plain()


def test_a_way_chosen_in_a_block_ends_with_it_after_an_error(auto_multiplies):
    with pytest.raises(KeyError), functional.use("grouped"):
        assert plain()
        raise KeyError
    assert not plain()


def test_a_way_chosen_by_a_call_stays(auto_multiplies):
    functional.use("grouped")
    assert plain()
    functional.use("auto")
    assert not plain()


def test_unknown_way_is_refused_with_the_known_ones_and_changes_nothing():
    with functional.use("grouped"):
        with pytest.raises(ValueError) as error:
            functional.use("fastest")
        assert "'fastest'" in str(error.value)
        assert all(way in str(error.value) for way in functional.WAYS)
        assert plain()


@pytest.mark.usefixtures("each_way")
def test_data_parallel_training_has_the_same_gradients(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model, size = dynamic("3x3", 1)
        x = torch.randn(4, *size, dtype=torch.float64)
        model(x).square().sum().backward()
        alone = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        DistributedDataParallel(model, gradient_as_bucket_view=True)(x).square().sum().backward()
        for parameter, grad in zip(model.parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    finally:
        dist.destroy_process_group()


def test_half_precision_gradients_are_near_those_of_float32(each_way):
    model, size = dynamic("3x3", 1)
    model, x = model.float(), torch.randn(4, *size)
    exact = computed(each_way, model, x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = computed(each_way, model, x)
    cells = next(name for name in exact if name.endswith("cells"))
    for name in ("output", "input", cells):  # the attention's own gradients pass a ReLU, whose sign rounding may turn
        assert (rough[name].float() - exact[name]).abs().max() <= 0.05 * exact[name].abs().max(), name


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_050"])
def test_auto_takes_what_it_expects_to_be_cheapest(backbone, step):
    """The table of scripts.ways and the choice are of one model."""
    record = pytest.importorskip("scripts.ways").record  # not there where the library is tested alone
    for call in record(timm.create_model(f"kw_{backbone}", n=1).eval(), torch.randn(2, 3, 64, 64)):
        expected = cost.costs(call.x.shape, call.cells.shape, call.task, step)
        seen: list[str] = []
        tensors = [t.requires_grad_(step) for t in (call.x, call.alpha, call.cells)]
        with pytest.MonkeyPatch.context() as patch:
            for way in expected:
                plain = functional.FUNCTIONS[way]
                patch.setitem(
                    functional.FUNCTIONS,
                    way,
                    lambda *a, way=way, plain=plain, seen=seen: (seen.append(way), plain(*a))[1],
                )
            functional.compute(*tensors, call.task)
        assert seen == [cost.cheapest(expected)]


def test_no_more_than_a_block_of_kernels_is_kept_for_the_backward_pass():
    """What is saved is the input, the attentions and the cells; the plain way saves every sample's kernel too."""
    model, size = dynamic("3x3, wide", 1)
    x = torch.randn(8, *size, dtype=torch.float64)

    def saved(way):
        sizes = {}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: (sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1],
                lambda t: t,
            ),
            functional.use(way),
        ):
            model(x)
        return sum(sizes.values())

    kernels = 8 * 96 * 128 * 9 * 8
    assert saved("grouped") > kernels > 4 * saved("multiply")
