"""Conversion: any model becomes dynamic in place, by a scope of one's own or the default one, or stays as it was."""

import copy
from functools import partial

import pytest
import timm
import torch
import torchvision
from helpers.models import assert_unchanged, snapshot
from helpers.selection import paired
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


# Models that no scope was written for, and the side of the image that they train on here.
MODELS = {
    "regnety_002": (partial(timm.create_model, "regnety_002", num_classes=5), 32),
    "efficientnet_b0": (partial(timm.create_model, "efficientnet_b0", num_classes=5), 32),
    "vit_tiny_patch16_224": (partial(timm.create_model, "vit_tiny_patch16_224", num_classes=5, img_size=32), 32),
    "resnext50_32x4d": (partial(timm.create_model, "resnext50_32x4d", num_classes=5), 32),
    "torchvision resnet18": (partial(torchvision.models.resnet18, num_classes=5), 32),
    "nn.Sequential": (small, 8),
}


def dynamic(model):
    """Layer name -> warehouse name."""
    return {name: m.warehouse.name for name, m in model.named_modules() if isinstance(m, KWLayer)}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# Models without a scope of their own


@pytest.mark.parametrize("name, n", paired(MODELS, ["1/2", 1]))
def test_default_scope_trains_with_a_gradient_on_every_parameter(name, n):
    build, side = MODELS[name]
    model = kw.convert(build(), config=KWConfig(n=n))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm zeroes some, which cuts a block off from gradients at first
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, side, side)), torch.arange(4))
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, side, side)).isfinite().all()


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"nn.Sequential"}))
def test_half_the_cells_are_at_most_twice_the_static_parameters(name):
    with torch.device("meta"):
        static = MODELS[name][0]()
        model = kw.convert(copy.deepcopy(static), config=HALF)
    assert parameters(model) <= 2 * parameters(static)
    kernels = sum(static.get_parameter(f"{layer}.weight").numel() for layer in dynamic(model))
    cells = sum(parameters(warehouse) for warehouse in model.warehouses.values())
    assert cells <= kernels
    assert kernels > 0.5 * parameters(static), "the bulk of the model is dynamic"


@pytest.mark.parametrize("name", MODELS)
def test_default_scope_leaves_stem_classifier_and_squeeze_excitation_static(name):
    with torch.device("meta"):
        model = MODELS[name][0]()
        scope = kw.default_scope(model)
    names = [key for key, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    excitations = [key for key in names if ".se." in key]
    assert bool(excitations) == (name in ("regnety_002", "efficientnet_b0"))
    head = {"nn.Sequential": "7", "torchvision resnet18": "fc"}.get(name)
    if head is None:
        head = next(key for key, module in model.named_modules() if module is model.get_classifier())
    assert scope
    assert not {names[0], head, *excitations} & scope.keys()


def test_default_scope_takes_every_other_layer():
    with torch.device("meta"):
        model = timm.create_model("efficientnet_b0")
    names = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d) and ".se." not in key]
    # The last convolution comes after the last stage.
    assert kw.default_scope(model).keys() == set(names) - {"conv_stem", "conv_head"}


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_a_warehouse_are_of_one_kind_and_stage(name):
    with torch.device("meta"):
        model = MODELS[name][0]()
    warehouses = {}
    for layer, warehouse in kw.default_scope(model).items():
        module = model.get_submodule(layer)
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1 and not depthwise
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        kind = (type(module), depthwise, grouped, pointwise)
        warehouses.setdefault(warehouse, set()).add(kind)
        assert ("depthwise" in warehouse) == depthwise and ("grouped" in warehouse) == grouped
        assert ("pointwise" in warehouse) == pointwise and ("linear" in warehouse) == isinstance(module, nn.Linear)
    assert all(len(kinds) == 1 for kinds in warehouses.values())


def test_stages_of_the_default_scope_are_those_of_the_model():
    scope = kw.default_scope(torchvision.models.resnet18())
    assert {(layer.split(".")[0], warehouse.split("_")[0]) for layer, warehouse in scope.items()} == {
        (f"layer{k}", f"stage{k}") for k in (1, 2, 3, 4)
    }
    with torch.device("meta"):
        scope = kw.default_scope(timm.create_model("regnety_002"))
    assert {(layer.split(".")[0], warehouse.split("_")[0]) for layer, warehouse in scope.items()} == {
        (f"s{k}", f"stage{k}") for k in (1, 2, 3, 4)
    }


def test_attentions_of_a_default_warehouse_stay_moderate():
    """Twenty like layers do not share one warehouse, for its attentions would outgrow the model."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(20)), nn.Linear(4, 4))
        for name in ("0", "20"):  # first and classifier
            assert name not in kw.default_scope(model)
        blocks = nn.ModuleDict({"stem": nn.Conv2d(3, 64, 3), "body": model, "head": nn.Linear(4, 4)})
        scope = kw.default_scope(blocks)
        kw.convert(blocks, scope)
    warehouses = set(scope.values())
    assert len(warehouses) > 1
    assert all(warehouse.mixtures <= 64 for warehouse in blocks.warehouses.values())


def test_default_scope_leaves_multihead_attention_alone():
    """nn.MultiheadAttention reads its layers' weights itself."""
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    kw.convert(model)
    assert set(dynamic(model)) == {"1.linear1", "1.linear2"}
    assert model(torch.randn(3, 4, 8)).shape == (3, 4, 3)


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


# What is refused, and how


@pytest.mark.parametrize(
    ("build", "scope", "config", "parts"),
    [
        (small, {}, None, ["matches no layer", "Sequential", "0, 3, 5, 7"]),
        (small, lambda name, layer: None, None, ["matches no layer", "Sequential"]),
        (lambda: nn.Sequential(nn.ReLU()), None, None, ["matches no layer", "none"]),
        (small, {"3": "a", "conv9": "a"}, None, ["'conv9'", "Sequential", "does not have"]),
        (small, {"1": "a"}, None, ["'1'", "BatchNorm2d", "'a'", "nn.Conv2d"]),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 1)), {"0": "a"}, None, ["'0'", "ConvTranspose2d", "nn.Conv2d"]),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), {"0": "a"}, None, ["'0'"]),
        (lambda: nn.Linear(4, 4), {"": "a"}, None, ["itself a Linear", "nn.Sequential"]),
        (small, {"3": "a", "7": "b"}, {"a": HALF}, ["no config", "'b'", "some for a"]),
        (small, {"3": ""}, None, ["''", "'3'", "without dots"]),
        (small, {"3": "stage.1"}, None, ["'stage.1'", "'3'", "without dots"]),
        (small, {"3": "items"}, None, ["'items'", "'3'"]),
        (small, {"3": 1}, None, ["warehouse 1", "'3'"]),
        (lambda: nn.Sequential(nn.Linear(9, 8)), {"0": "a"}, HALF, ["'0'", "'a'", "9 input channels", "cell_in"]),
        (small, {"7": "b", "3": "a"}, HALF.replace(cell_in=1, cell_out=1), ["'a'", "'3' (9 mixtures)", "larger n"]),
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
    with pytest.raises(ValueError, match=r"'bad'.*'layer4\.1\.conv2'"):
        kw.convert(model, scope, {"fine": KWConfig(), "bad": HALF.replace(cell_in=1, cell_out=1)})
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
