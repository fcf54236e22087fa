"""Conversion: any model becomes dynamic in place, by a scope of one's own or the default one, or stays as it was."""

import copy

import pytest
import timm
import torch
from helpers.models import assert_unchanged, snapshot
from torch import nn

import kw
from kw import KWConfig
from kw.layers import KWLayer

HALF = KWConfig(n="1/2")


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.Flatten(),
        nn.Linear(16 * 64, 6),
    )


def dynamic(model):
    """Layer name -> warehouse name."""
    return {name: m.warehouse.name for name, m in model.named_modules() if isinstance(m, KWLayer)}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# Scopes of one's own


def test_mapping_and_callable_scope_agree():
    mapping = {"3": "a", "5": "a", "7": "b"}
    for other in (lambda name, layer: mapping.get(name), lambda name, layer: mapping.get(name) if layer else None):
        torch.manual_seed(1)
        one = kw.convert(small(), mapping, HALF)
        torch.manual_seed(1)
        two = kw.convert(small(), other, HALF)
        assert dynamic(one) == dynamic(two) == mapping
        assert one.state_dict().keys() == two.state_dict().keys()
        assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def test_callable_scope_is_given_every_module_by_name():
    seen = {}
    model = small()
    kw.convert(model, lambda name, layer: seen.setdefault(name, layer) and ("a" if name == "3" else None))
    assert list(seen) == ["", *(str(k) for k in range(8))]
    assert isinstance(seen["3"], nn.Conv2d)


def test_warehouses_are_in_order_of_first_use_and_layers_in_module_order():
    model = kw.convert(small(), {"7": "first", "5": "second", "3": "third", "0": "second"})
    assert list(model.warehouses) == ["second", "third", "first"]
    assert [share.kernel.name for share in model.warehouses["second"].shares] == ["0", "5"]


@pytest.mark.parametrize(
    "config", [{"a": HALF, "b": KWConfig(n=2)}, lambda name: HALF if name == "a" else KWConfig(n=2)]
)
def test_each_warehouse_has_its_config(config):
    model = kw.convert(small(), {"3": "a", "7": "b"}, config)
    assert {name: warehouse.config.n for name, warehouse in model.warehouses.items()} == {"a": HALF.n, "b": 2}


def test_config_is_left_out_for_n_of_one():
    assert kw.convert(small(), {"3": "a"}).warehouses["a"].config == KWConfig(n=1)


def test_model_is_converted_in_place_and_the_rest_of_it_kept():
    model = small()
    kept = {name: module for name, module in model.named_children() if name != "3"}
    entries = {key: value for key, value in model.state_dict(keep_vars=True).items() if not key.startswith("3.")}
    assert kw.convert(model, {"3": "a"}) is model
    assert all(model.get_submodule(name) is module for name, module in kept.items())
    assert all(model.state_dict(keep_vars=True)[key] is value for key, value in entries.items())
    assert isinstance(model[3], kw.KWConv2d)


def test_bias_is_kept_where_there_is_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.Linear(5, 5))
    biases = model[0].bias, model[2].bias
    kw.convert(model, {"0": "a", "1": "a", "2": "b"})
    assert model[0].bias is biases[0] and model[2].bias is biases[1]
    assert model[1].bias is None


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 8, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular"),
        nn.Conv2d(4, 8, (3, 5), padding="same", bias=False),
        nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(1, 0), groups=4, padding_mode="reflect"),
        nn.Conv3d(4, 8, 3, padding="valid", padding_mode="replicate"),
        nn.Linear(4, 8),
    ],
    ids=str,
)
def test_arguments_of_a_layer_are_kept(layer):
    static = copy.deepcopy(layer)
    model = kw.convert(nn.Sequential(layer), {"0": "a"}, KWConfig(attention_norm="layer"))
    x = torch.randn(2, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, *[9] * (static.weight.dim() - 2))
    # At temperature 1 every sample has the kernel that the cells make, which torch's layer can have.
    kw.set_temperature(model, 1)
    with torch.no_grad():
        shape = static.weight.shape  # n = 1: one whole cell per position
        static.weight.copy_(model.warehouses["a"].cells.permute(1, 2, 0).reshape(shape))
        torch.testing.assert_close(model(x), static(x))


def test_layer_used_in_two_places_is_replaced_in_both():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    model = kw.convert(nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer), nn.Conv2d(4, 4, 1)), {"0": "a"}).eval()
    assert isinstance(model[0], kw.KWConv2d)
    assert model[0] is model[1][1]
    assert len(model.warehouses["a"].shares) == 1
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(x), model[2](model[0](model[0](x).relu())))


def test_conversion_on_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 20, 1 << 20), nn.ReLU(), nn.Linear(1 << 20, 1 << 20))
        kw.convert(model, {"0": "a", "2": "a"}, HALF)
    assert all(value.is_meta for value in model.state_dict().values())
    assert parameters(model.warehouses["a"]) == 1 << 40


def test_conversion_follows_the_models_device_outside_of_its_context():
    with torch.device("meta"):
        model = small()
    kw.convert(model, {"3": "a", "7": "b"}, HALF)
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_kept(dtype):
    model = kw.convert(small().to(dtype), {"3": "a", "7": "b"}, HALF)
    assert all(value.dtype == dtype for value in [*model.parameters(), *model.buffers()] if value.is_floating_point())
    assert model(torch.randn(2, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_mode_is_kept():
    model = kw.convert(small().eval(), {"3": "a"})
    assert not any(module.training for module in model[3].modules())
    assert all(module.training for module in kw.convert(small(), {"3": "a"})[3].modules())


@pytest.mark.parametrize("q", [2, 3, 4, 8])
def test_uneven_mixtures_are_rounded_to_a_whole_number_of_cells(q):
    """9 mixtures, then 1; every layer keeps a cell, so that its kernel is not zero at temperature 1."""
    config = KWConfig(n=f"1/{q}", cell_in=1, cell_out=1)
    with pytest.warns(UserWarning, match=rf"'b' \(1 cells for 1 mixtures at n = 1/{q}\)"):
        model = kw.convert(small(), {"3": "a", "5": "b"}, config)
    cells = {name: len(warehouse.cells) for name, warehouse in model.warehouses.items()}
    assert cells["b"] == 1 and 9 // q <= cells["a"] <= 9 // q + 1
    kw.set_temperature(model, 1)
    for layer in (model[3], model[5]):
        used = {anchor for anchor in layer.share.anchors if anchor < len(layer.warehouse.cells)}
        assert used == set(range(len(layer.warehouse.cells)))
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


# What is refused, and how


@pytest.mark.parametrize(
    ("build", "scope", "config", "parts"),
    [
        (small, {}, None, ["matches no layer", "Sequential", "0, 3, 5, 7"]),
        (small, lambda name, layer: None, None, ["matches no layer", "Sequential"]),
        (lambda: nn.Sequential(nn.ReLU()), None, None, ["No layer", "Sequential", "kw.plan"]),
        (small, None, HALF, ["No layer", "'0': reads the model's input", "'3': attention too large: at least"]),
        (small, None, {"a": HALF}, ["one KWConfig"]),
        (small, 2, None, ["scope=2", "kw.KWConfig(n=2)"]),
        (small, {"3": "a", "conv9": "a"}, None, ["'conv9'", "Sequential", "does not have"]),
        (small, {"1": "a"}, None, ["'1'", "BatchNorm2d", "'a'", "nn.Conv2d"]),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 1)), {"0": "a"}, None, ["'0'", "ConvTranspose2d", "nn.Conv2d"]),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), {"0": "a"}, None, ["'0'"]),
        (lambda: nn.Linear(4, 4), {"": "a"}, None, ["itself a Linear", "nn.Sequential"]),
        (small, {"3": "a", "7": "b"}, {"a": HALF}, ["no config", "'b'", "some for a"]),
        (small, {"3": "a"}, {"a": "1/2"}, ["'a'", "'1/2'", "kw.KWConfig(n=2)"]),
        (small, {"3": "a"}, lambda warehouse: None, ["'a'", "None", "kw.KWConfig(n=2)"]),
        (small, {"3": "a"}, 2, ["'a'", "2", "kw.KWConfig(n=2)"]),
        (small, {"3": ""}, None, ["''", "'3'", "without dots"]),
        (small, {"3": "stage.1"}, None, ["'stage.1'", "'3'", "without dots"]),
        (small, {"3": "items"}, None, ["'items'", "'3'"]),
        (small, {"3": 1}, None, ["warehouse 1", "'3'"]),
        (lambda: nn.Sequential(nn.Linear(9, 8)), {"0": "a"}, HALF, ["'0'", "'a'", "9 input channels", "cell_in"]),
    ],
)
def test_refusal_names_what_is_wrong_and_leaves_the_model_as_it_was(build, scope, config, parts):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        kw.convert(model, scope, config)
    assert all(part in str(error.value) for part in parts), error.value
    assert_unchanged(model, before)


def test_error_in_the_last_warehouse_leaves_the_model_as_it_was():
    model = timm.create_model("resnet18")
    before = snapshot(model)
    scope = {"layer1.0.conv1": "fine", "layer4.1.conv2": "bad"}
    with pytest.raises(ValueError, match=r"'layer4\.1\.conv2'.*'bad'"):
        kw.convert(model, scope, {"fine": KWConfig(), "bad": HALF.replace(cell_in="1/3")})
    assert_unchanged(model, before)


def test_second_conversion_is_refused():
    model = kw.convert(small(), {"3": "a"})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Sequential has dynamic layers already.*vanilla"):
        kw.convert(model, {"5": "b"})
    assert_unchanged(model, before)


def test_model_with_an_attribute_warehouses_of_its_own_is_refused():
    model = small()
    model.warehouses = 3
    with pytest.raises(ValueError, match="an attribute 'warehouses' already"):
        kw.convert(model, {"3": "a"})
    assert model.warehouses == 3
