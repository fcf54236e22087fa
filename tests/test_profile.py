"""The profile: its parts add up to its totals, and the totals are the published ones."""

import re

import pytest
import timm
import torch
from helpers.selection import paired, representative
from PIL import Image
from torch import nn

import kw
from kw.config import STATIC
from scripts import plan_survey, profile_model
from scripts.profile_model import composed, draw, profile_of


def profile(name, n, **kwargs):
    with torch.device("meta"):
        return kw.profile(timm.create_model(f"kw_{name}", n=n), **kwargs)


@pytest.mark.parametrize(
    "name, n", paired(["resnet18", "resnet50", "mobilenetv2_050", "convnext_tiny"], [STATIC, "1/2", 1, 4])
)
def test_parts_add_up_to_the_totals(name, n):
    result = profile(name, n)
    assert result.other_macs == 0  # convolutional backbones have no products outside their layers
    assert sum(layer.macs for layer in result.layers) == result.macs
    sharing = {layer.name: layer.warehouse for layer in result.layers if layer.warehouse}
    assert sharing == {layer: warehouse.name for warehouse in result.warehouses for layer in warehouse.layers}
    assert all(layer.assembly == layer.attention == 0 for layer in result.layers if not layer.warehouse)


@pytest.mark.parametrize("n", [STATIC, 1])
def test_softmax_attention_is_what_no_layer_has(n):
    result = profile("deit_tiny_patch16_224", n)
    assert result.other_macs == 12 * 2 * 197 * 197 * 192  # blocks, two products each, of tokens by tokens by channels


@pytest.mark.parametrize("name, n", [("resnet18", "1/4"), ("mobilenetv2_050", "1/2"), ("deit_tiny_patch16_224", 4)])
def test_parameters_are_those_of_the_model(name, n):
    with torch.device("meta"):
        model = timm.create_model(f"kw_{name}", n=n)
    result = kw.profile(model)
    assert result.params == sum(parameter.numel() for parameter in model.parameters())
    cells = {warehouse.name: warehouse.params for warehouse in result.warehouses}
    assert cells == {key: warehouse.cells.numel() for key, warehouse in model.warehouses.items()}


@pytest.mark.parametrize("name, gigamacs", [("resnet18", 1.814), ("mobilenetv2_100", 0.301)])
def test_static_models_cost_what_is_published(name, gigamacs):
    assert round(profile(name, STATIC).macs / 1e9, 3) == gigamacs


@pytest.mark.parametrize(
    "name, n, share",
    [
        ("resnet18", 1, 0.23),
        ("resnet18", 4, 0.91),
        ("resnet50", 1, 0.52),
        ("resnet50", 4, 2.08),
        ("convnext_tiny", 1, 0.28),
    ],
)
def test_assembly_as_a_share_of_the_dynamic_layers_convolution(name, n, share):
    dynamic = [layer for layer in profile(name, n).layers if layer.warehouse]
    assert round(sum(layer.assembly for layer in dynamic) / sum(layer.apply for layer in dynamic), 2) == share


def test_input_size_scales_the_convolution_and_not_the_assembly():
    full, half = (profile("resnet18", 1, input_size=(3, side, side)) for side in (128, 64))
    for large, less in zip(full.layers, half.layers, strict=True):
        assert large.apply == less.apply * (1 if large.kind == "Linear" else 4)
        assert (large.assembly, large.attention) == (less.assembly, less.attention)


def test_model_is_left_as_it_was():
    model = timm.create_model("kw_mobilenetv2_050", n=1).train()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kw.profile(model, (3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_mode_is_restored_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 5)).train()
    with pytest.raises(RuntimeError):
        kw.profile(model, (3, 32, 32))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_table_names_layers_and_warehouses():
    result = profile("resnet18", 1)
    text = str(result)
    for part in (*result.layers, *result.warehouses):
        assert part.name in text
    assert f"{result.params:,} parameters" in text
    assert f"{result.macs:,} multiply-adds" in text


@pytest.mark.parametrize(
    "name, n", [("resnet18", "1/4"), ("convnext_tiny", 1), ("mobilenetv2_050", 4), ("resnet50", "1/2")]
)
def test_shares_give_each_cell_to_one_layer_and_count_all_mixtures(name, n):
    result = profile(name, n)
    mixtures = {layer.name: layer.mixtures for layer in result.layers if layer.warehouse}
    assert {share.layer: share.mixtures for w in result.warehouses for share in w.shares} == mixtures
    for warehouse in result.warehouses:
        cells = [share.start + k for share in warehouse.shares for k in range(share.owned)]
        assert cells == list(range(warehouse.cells[0])), warehouse.name
        assert warehouse.mixtures * kw.config.parse_budget(warehouse.budget) == warehouse.cells[0]


@pytest.mark.parametrize("name, n", [("resnet18", STATIC), ("resnet18", 4), ("deit_tiny_patch16_224", 1)])
def test_the_tables_columns_add_up_to_its_total(name, n):
    result = profile(name, n)
    first = str(result).split("\n\n")[0].splitlines()[2:]
    numbers = [[int(word.replace(",", "")) for word in line.split()[-5:] if word != "-"] for line in first]
    total = numbers.pop()
    assert total == [result.params, result.apply, result.assembly, result.attention, result.macs]
    assert (
        result.other_params
        + sum(row[0] for row in numbers if len(row) == 5)
        + sum(warehouse.params for warehouse in result.warehouses)
        == result.params
    )
    assert sum(row[-1] for row in numbers if len(row) == 5) + result.other_macs == result.macs


def test_the_table_tells_which_cells_are_whose():
    text = str(profile("resnet18", "1/4"))
    assert re.search(r"stage0 +1/4 +56 of 32 x 32 +224 +56 +57,344", text)
    assert re.search(r"  layer1.0.conv2 +9 to 17 +36 +9 +9,216", text)


DRAWN = [["backbone=resnet18", "n=1/4"], ["experiment=deit_tiny"], ["backbone=timm", "backbone.name=regnetx_002"]]


@pytest.mark.parametrize("settings", representative(DRAWN, lambda *words: "backbone=timm" in words[0]))
def test_the_sharing_is_drawn_for_any_model(settings, tmp_path):
    config = composed(settings)
    draw(profile_of(config), "a model", tmp_path / "sharing.png")
    assert Image.open(tmp_path / "sharing.png").height > 300


def test_the_survey_of_plans_counts_the_models_that_keep_the_promises(capsys):
    plan_survey.main(["models=2"])
    first, _, _, *rows = capsys.readouterr().out.splitlines()
    assert first == f"2 models of timm {timm.__version__}"
    counts = {n: (int(kept), int(reached), names) for n, kept, reached, *names in map(str.split, rows)}
    assert list(counts) == ["1/8", "1/4", "1/2", "1", "2", "4"]
    for kept, reached, names in counts.values():
        assert 0 <= reached <= 2 and kept == 2 and len(names) == 2 - reached
    with pytest.raises(SystemExit, match="model=2: did you mean models="):
        plan_survey.main(["model=2"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out={file}/below/x.png"], "could not be written"),
        (["backbone=resnet18x"], "Did you mean resnet18"),
        (["nn=7/2"], "Did you mean"),
    ],
)
def test_what_cannot_be_done_ends_in_a_line(words, said, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=said) as left:
        profile_model.main([word.format(file=tmp_path / "file") for word in words])
    assert "\n" not in str(left.value)
