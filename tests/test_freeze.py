"""Freezing: the same outputs with less to compute, a report that is true, and no return."""

import copy
import io
import math

import pytest
import timm
import torch
from helpers.selection import representative
from torch import nn

import kw
from kw.backbones import BACKBONES
from kw.config import STATIC
from kw.folding import FoldedLayer
from kw.freezing import FOLDED
from kw.layers import KWLayer
from kw.warehouse import Warehouse

# One budget each, so that together the models have norms of both kinds, a non-local basis, and much and little to fold.
BUDGETS = {
    "resnet18": 4,
    "resnet50": "1/2",
    "mobilenetv2_100": 4,
    "mobilenetv2_050": "1/2",
    "convnext_tiny": 1,
    "deit_tiny_patch16_224": 1,
    "deit_small_patch16_224": "1/2",
}
FAMILIES = ("resnet18", "mobilenetv2_050", "convnext_tiny", "deit_tiny_patch16_224")  # the smallest of each
FOLDING = ["resnet18", "resnet50", "convnext_tiny"]


@torch.no_grad()
def trained(model, tau=0.0):
    """As after training: norms have statistics and weights of their own, biases are not zero."""
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name == "running_var" or (name == "weight" and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5)
            elif name in ("bias", "running_mean", "basis_bias"):
                tensor.normal_(0, 0.1)
            elif name == "gamma":  # ConvNeXt's layer scale is 1e-6 at first, which would hide its blocks
                tensor.fill_(0.5)
    kw.set_temperature(model, tau)
    return model.eval()


def backbone(name, n=None, tau=0.0, **kwargs):
    size = {"img_size": 32} if name.startswith("deit") else {}
    kwargs = {"num_classes": 7, **kwargs} if "features_only" not in kwargs else kwargs
    return trained(timm.create_model(f"kw_{name}", n=n or BUDGETS[name], **size, **kwargs), tau)


def layer(factory, *args, n=8, tau=0.0, **config):
    """A dynamic layer in a model of its own, with settings under which folding pays."""
    model = nn.Sequential(factory(*args) if callable(factory) else factory)
    kw.convert(model, lambda name, module: "w" if name == "0" else None, kw.KWConfig(n=n, **config))
    return trained(model.double(), tau)


def check(model, *inputs, rtol=1e-9, memory=math.inf, **kwargs):
    """Freeze `model`; its outputs must stay what they were. The report."""
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        report = kw.freeze(model, memory, **kwargs)
        for x, outputs in zip(inputs, expected, strict=True):
            for frozen, output in zip(*([y] if torch.is_tensor(y) else y for y in (model(x), outputs)), strict=True):
                assert output.numel() == 0 or output.std() > 0
                scale = output.abs().max().item() if output.numel() else 1
                torch.testing.assert_close(frozen, output, rtol=rtol, atol=rtol * scale)
    return report


def images(batch=2):
    return torch.randn(batch, 3, 32, 32)


def dynamic(model):
    return [module for module in model.modules() if isinstance(module, KWLayer)]


@pytest.mark.parametrize("name", BACKBONES)
def test_outputs_stay_the_same(name):
    model = backbone(name).double()
    layers = len(dynamic(model))
    report = check(model, images().double(), memory=1.0)
    assert len(report.layers) == layers
    assert report.folded == sum(isinstance(module, FoldedLayer) for module in model.modules())
    assert (report.folded > 0) == (name in FOLDING)
    assert report.norms == (0 if name.startswith(("convnext", "deit")) else layers)
    assert not any(isinstance(module.attention.norm, nn.BatchNorm1d) for module in dynamic(model))


@pytest.mark.parametrize("name", representative(["resnet18", "mobilenetv2_100"], "mobilenetv2_100".__eq__))
def test_single_precision_is_as_exact_as_before(name):
    model, image = backbone(name), images()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = exact(image.double())
        before = (model(image) - expected).abs().max()
        kw.freeze(model)
        after = (model(image) - expected).abs().max()
    assert after <= 4 * before + 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", representative(BACKBONES, FAMILIES.__contains__))
def test_at_temperature_one_the_vanilla_model_is_left(name):
    n = "1/2" if name.startswith("resnet") else BUDGETS[name]
    model = backbone(name, n, tau=1)
    report = check(model, images(), rtol=1e-5, norms=False)
    assert (report.static, report.norms, report.folded) == (len(report.layers), 0, 0)
    assert not any(isinstance(module, (KWLayer, Warehouse)) for module in model.modules())
    size = {"img_size": 32} if name.startswith("deit") else {}
    vanilla = timm.create_model(f"kw_{name}", n=STATIC, num_classes=7, **size).eval()
    vanilla.load_state_dict(model.state_dict())
    image = images()
    with torch.no_grad():
        torch.testing.assert_close(vanilla(image), model(image))


def test_half_way_only_norms_are_folded():
    model = backbone("mobilenetv2_050", tau=0.5).double()
    report = check(model, images().double())
    assert (report.norms, report.static, report.folded) == (len(report.layers), 0, 0)
    assert all("temperature" in row.kernel for row in report.layers)


CONVOLUTIONS = [
    ((nn.Conv1d, 8, 12, 3), (9,)),
    ((nn.Conv2d, 8, 12, 1), (5, 6)),
    ((nn.Conv2d, 8, 12, 1, 2), (5, 6)),
    ((nn.Conv2d, 8, 12, 1, 1, 1), (5, 6)),
    ((nn.Conv2d, 8, 12, 3, 2, 1), (5, 6)),
    ((nn.Conv2d, 8, 12, (3, 1), 1, "same", (2, 1)), (5, 6)),
    ((nn.Conv2d, 8, 12, 1, 1, "same"), (5, 6)),
    ((nn.Conv2d, 8, 12, 3, 1, 1, 1, 4), (5, 6)),
    ((nn.Conv2d, 8, 8, 3, 1, 1, 1, 8, False), (5, 6)),
    ((nn.Conv2d, 8, 12, 3, 2, (1, 2), 1, 1, True, "circular"), (5, 6)),
    ((nn.Conv2d, 8, 12, 1, 1, "same", 1, 1, True, "reflect"), (5, 6)),
    ((nn.Conv3d, 8, 12, 3, 1, 1), (3, 4, 5)),
]


@pytest.mark.parametrize("arguments, space", CONVOLUTIONS, ids=lambda value: "-".join(map(str, value[1:])))
def test_every_kind_of_convolution_folds(fold_all, arguments, space):
    model = layer(*arguments, cell_in="1/2", cell_out="1/4")
    report = check(model, *(torch.randn(batch, 8, *space).double() for batch in (3, 1, 0)))
    assert report.folded == 1
    assert not hasattr(model.warehouses, "w")
    with pytest.raises(ValueError, match=r"'0'.*batch"):
        model[0](torch.randn(8, *space).double())


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_fold_at_any_number_of_dimensions(fold_all, bias):
    model = layer(nn.Linear, 8, 12, bias)
    report = check(model, *(torch.randn(*shape, 8).double() for shape in ((3,), (3, 5), (2, 4, 5), (1, 2), (0, 5))))
    assert report.folded == 1


@pytest.mark.parametrize(
    "config",
    [
        {"n": "1/2"},
        {"attention_norm": "layer"},
        {"n": "1/2", "nonlocal_basis": "1/4"},
        {"n": 2, "cell_in": "1/2"},
    ],
    ids=str,
)
def test_every_kind_of_attention_folds(fold_all, config):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 4), nn.ReLU(), nn.Conv2d(8, 8, 2))
    kw.convert(model, lambda name, module: "w" if isinstance(module, nn.Conv2d) else None, kw.KWConfig(**config))
    report = check(trained(model.double()), torch.randn(3, 8, 9, 9).double())
    assert report.folded == 3


def test_scores_that_the_constant_of_the_normalizer_outweighs(fold_all):
    model = layer(nn.Conv2d, 8, 12, 3)
    with torch.no_grad():
        for parameter in model[0].attention.fc2.parameters():
            parameter.mul_(1e-6)
    check(model, torch.randn(3, 8, 5, 5).double())


@pytest.mark.parametrize("batch", [1, 0])
def test_batches_of_one_and_of_none(fold_all, batch):
    check(backbone("mobilenetv2_100").double(), images(batch).double())


@pytest.mark.parametrize("name, n", [("resnet18", 2), ("mobilenetv2_050", "1/2")])
def test_features(name, n):
    check(backbone(name, n, features_only=True).double(), images().double())


@pytest.mark.parametrize("name", ["regnety_002", "mobilenetv3_small_050"])
def test_models_that_were_converted_as_planned(fold_all, name):
    model = kw.convert(timm.create_model(name, num_classes=7), config=kw.KWConfig(n=8))
    assert check(trained(model).double(), images().double()).folded


def test_a_layer_used_twice_is_handled_once(fold_all):
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared), nn.Conv2d(8, 8, 3))
    kw.convert(model, lambda name, module: "w" if isinstance(module, nn.Conv2d) else None, kw.KWConfig(n=8))
    report = check(trained(model).double(), torch.randn(2, 8, 6, 6).double())
    assert [row.name for row in report.layers] == ["0", "3"]
    assert model[0] is model[2][0] and isinstance(model[0], FoldedLayer)


def test_gradients_with_respect_to_the_input_stay_the_same(fold_all):
    model = layer(nn.Conv2d, 8, 12, 3)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), x)
    kw.freeze(model, math.inf)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x), expected)


def test_memory_is_a_limit():
    model = backbone("resnet18", 2)
    kept, larger, free = (kw.freeze(copy.deepcopy(model), memory) for memory in (0, 0.5, math.inf))
    assert kept.folded == 0 and kept.bytes <= kept.bytes_before
    assert 0 < larger.folded < free.folded
    assert larger.bytes <= 1.5 * larger.bytes_before < free.bytes
    assert any("limit" in row.kernel for row in larger.layers)
    assert any("little" in row.kernel for row in free.layers)


def test_report_is_a_table_that_agrees_with_the_profile(fold_all):
    model = backbone("mobilenetv2_100")
    before = {cost.name: cost.assembly for cost in kw.profile(model, (3, 32, 32)).layers if cost.warehouse}
    report = kw.freeze(model)
    assert {row.name: row.assembly_before for row in report.layers} == before
    for row in report.layers:
        assert row.name in str(report)
        assert (row.assembly != row.assembly_before) == row.kernel.startswith("mixed")
        assert row.norm == FOLDED
    assert f"{report.folded} assemblies folded" in str(report)
    assert f"{sum(before.values()):,} ->" in str(report)
    tensors = [*model.parameters(), *model.buffers()]
    assert report.bytes == sum(tensor.nbytes for tensor in tensors)


def test_profile_counts_what_a_frozen_model_computes(fold_all):
    model = backbone("mobilenetv2_100")
    before = kw.profile(model, (3, 32, 32)).macs
    report = kw.freeze(model)
    saved = sum(row.assembly_before - row.assembly for row in report.layers)
    assert before - kw.profile(model, (3, 32, 32)).macs >= saved > 0


def test_state_is_saved_and_loaded_into_a_model_frozen_alike(fold_all):
    model, other = backbone("mobilenetv2_100"), backbone("mobilenetv2_100")
    kw.freeze(model)
    kw.freeze(other)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    image = images()
    with torch.no_grad():
        torch.testing.assert_close(other(image), model(image), rtol=0, atol=0)


def test_a_frozen_model_does_not_train_and_says_what_to_do():
    model = backbone("mobilenetv2_050")
    original = copy.deepcopy(model)
    kw.freeze(model)
    for module in (model, dynamic(model)[0], copy.deepcopy(model)):
        module.train()
        with pytest.raises(RuntimeError, match=r"eval\(\).*copy\.deepcopy"):
            module(images())
    model.eval()(images())
    for attempt in (
        kw.freeze,
        lambda model: kw.freeze(nn.Sequential(model)),
        lambda model: kw.set_temperature(model, 0.5),
        lambda model: kw.load_released(model, {}),
        kw.to_released,
    ):
        with pytest.raises(ValueError, match=r"is frozen and .*copy\.deepcopy"):
            attempt(model)
    original.train()(images())


def test_the_mark_of_a_frozen_model_can_be_read_and_is_copied_and_saved():
    model = backbone("mobilenetv2_050")
    original = copy.deepcopy(model)
    kw.freeze(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for frozen in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert frozen.is_frozen
        with pytest.raises(ValueError, match="is frozen"):
            kw.freeze(frozen)
    assert not hasattr(original, "is_frozen")
    kw.set_temperature(original, 0.5)


def test_models_with_nothing_to_freeze_are_refused():
    with pytest.raises(ValueError, match=r"no dynamic layer.*kw\.convert"):
        kw.freeze(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match="Sequential"):
        kw.freeze(layer(nn.Conv2d, 8, 12, 3)[0])


@pytest.mark.parametrize("memory", [-1, math.nan])
def test_bad_memory_is_refused_and_the_model_left_as_it_was(memory):
    model = layer(nn.Conv2d, 8, 12, 3).train()
    with pytest.raises(ValueError, match="memory"):
        kw.freeze(model, memory)
    assert model.training and isinstance(model[0].attention.norm, nn.BatchNorm1d)
    model(torch.randn(2, 8, 5, 5).double())


def test_a_norm_without_running_statistics_stays():
    model = layer(nn.Conv2d, 8, 12, 3)
    model[0].attention.norm = nn.BatchNorm1d(16, track_running_stats=False).double().eval()
    assert "no running statistics" in check(model, torch.randn(4, 8, 5, 5).double()).layers[0].norm


# ---- norms of the model, merged into layers ----


@pytest.mark.parametrize("name", representative(["resnet18", "mobilenetv2_100", "convnext_tiny"], "resnet18".__eq__))
def test_norms_after_static_layers_are_merged_into_them(name):
    model = backbone(name, n=1, tau=1).double()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    report = check(model, images().double())
    assert report.merged == norms and (norms > 0) == (not name.startswith("convnext"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.slow
def test_norms_after_folded_layers_are_merged_into_them(fold_all):
    model = backbone("resnet18", n=1).double()
    report = check(model, images().double())
    assert report.folded == len(report.layers) and report.merged == 20


@pytest.mark.parametrize(
    ("config", "scope", "merged"),
    [
        ({"n": 2}, {"0": "a"}, 1),  # alone in its warehouse, cells with all output channels
        ({"n": "1/4"}, {"0": "a"}, 0),  # rows of cells are of several channels
        ({"n": 2}, {"0": "a", "2": "a"}, 0),  # two layers, two scales
    ],
)
def test_norms_after_dynamic_layers_are_merged_only_where_that_is_exact(config, scope, merged):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU())
    kw.convert(model, scope, kw.KWConfig(**config))
    model = trained(model.double(), tau=0.3)
    report = check(model, torch.randn(3, 8, 9, 9, dtype=torch.float64), memory=0)
    assert report.merged == merged


def test_a_norm_stays_where_others_read_the_layer_or_hooks_see_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.other, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.dynamic = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return self.dynamic(self.last(self.other(self.norm(x) + x)))

    model = kw.convert(Twice(), {"dynamic": "w"}, kw.KWConfig(n=2))
    model.other.register_forward_hook(lambda module, args, output: None)
    report = check(trained(model.double()), torch.randn(2, 4, 5, 5, dtype=torch.float64))
    assert report.merged == 0


# ---- cells in a narrow type ----


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 2e-2), (torch.int8, 4e-2)])
@pytest.mark.parametrize("name", representative(BACKBONES, ["resnet18", "deit_tiny_patch16_224"].__contains__))
def test_narrow_cells_change_the_outputs_little_and_take_less_memory(name, dtype, close):
    model = backbone(name, tau=0.2)
    cells = sum(warehouse.cells.numel() for warehouse in model.warehouses.values())
    x = images(3)
    with torch.no_grad():
        expected = model(x)
        report = kw.freeze(model, dtype=dtype)
        found = model(x)
    difference = (found - expected).abs().max() / expected.abs().max()
    assert 0 < difference < close
    assert report.folded == 0 and not dynamic(model)
    saved = 4 - torch.zeros((), dtype=dtype).element_size()
    assert report.bytes < report.bytes_before - 0.9 * saved * cells
    with torch.no_grad():  # dtypes of a model may change, not that of its cells
        assert model.double()(x.double()).dtype == torch.float64
    assert {m.cells.dtype for m in model.modules() if hasattr(m, "scale") and hasattr(m, "cells")} == {dtype}


def test_narrow_cells_are_those_of_the_layer_rounded():
    """Each cell to 1/127 of its largest value; the kernels are sums of these."""
    model = layer(nn.Conv2d, 4, 8, 3, n=4)
    cells, x = model[0].warehouse.cells.detach().clone(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    rounded = copy.deepcopy(model)
    scale = cells.abs().amax(dim=(1, 2), keepdim=True) / 127
    rounded[0].warehouse.cells.data = (cells / scale).round() * scale
    with torch.no_grad():
        expected = rounded(x)
        kw.freeze(model, dtype=torch.int8)
        model[0].cells.scale = model[0].cells.scale.double()
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_a_type_that_cells_cannot_have_is_named():
    with pytest.raises(ValueError, match=r"torch\.float16 is not for cells.*torch\.int8"):
        kw.freeze(layer(nn.Conv2d, 4, 8, 3), dtype=torch.float16)
