"""kw.create_model: one builder for any timm model, static, with KernelWarehouse, or with a method to compare with."""

import pytest
import timm
import torch
from helpers.selection import paired, representative
from torch import nn

import kw
from kw.backbones import BACKBONES
from kw.baselines import BASELINES
from kw.config import KW, STATIC
from kw.layers import KWLayer
from kw.warehouse import Warehouse

REGISTERED, OTHERS = "resnet18", ("regnety_002", "efficientnet_b0", "vit_tiny_patch16_224")
METHODS = (KW, STATIC, *sorted(BASELINES))


def meta(name, **kwargs):
    with torch.device("meta"):
        return kw.create_model(name, **kwargs)


def shapes(model):
    return {key: value.shape for key, value in model.state_dict().items()}


def dynamic_layers(model):
    return [module for module in model.modules() if isinstance(module, kw.layers.DynamicLayer)]


@pytest.mark.parametrize("name, dynamic", paired([REGISTERED, "regnety_002"], METHODS))
def test_every_method_builds_registered_and_other_models(name, dynamic):
    model = meta(name, n=2, dynamic=dynamic, num_classes=7)
    kinds = {KW: KWLayer} | {method: BASELINES[method].layer for method in BASELINES}
    layers = dynamic_layers(model)
    assert not layers if dynamic == STATIC else layers and all(isinstance(layer, kinds[dynamic]) for layer in layers)
    assert model.eval()(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", representative(BACKBONES, ("resnet18", "deit_tiny_patch16_224").__contains__))
def test_registered_models_have_the_published_warehouses_with_and_without_the_prefix(name):
    with torch.device("meta"):
        published = timm.create_model(f"kw_{name}", n="1/2")
    assert shapes(meta(name, n="1/2")) == shapes(meta(f"kw_{name}", n="1/2")) == shapes(published)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_have_the_warehouses_of_the_plan(name):
    with torch.device("meta"):
        converted = kw.convert(timm.create_model(name), config=kw.KWConfig(n="1/2"))
    assert shapes(meta(name, n="1/2")) == shapes(converted)


@pytest.mark.parametrize("name", [REGISTERED, *OTHERS])
def test_static_is_timms_model_whatever_the_budget(name):
    with torch.device("meta"):
        vanilla = timm.create_model(name)
    assert shapes(meta(name, n=STATIC)) == shapes(meta(name, n=4, dynamic=STATIC)) == shapes(vanilla)
    assert not dynamic_layers(meta(name, n=STATIC, dynamic="odconv"))


@pytest.mark.parametrize("name", [REGISTERED, "regnety_002"])
def test_settings_reach_every_warehouse_and_the_rest_goes_to_timm(name):
    model = meta(name, n=1, reduction="1/8", attention_norm="layer", num_classes=5, in_chans=1)
    warehouses = [module for module in model.modules() if isinstance(module, Warehouse)]
    assert warehouses and {(w.config.reduction, w.config.attention_norm) for w in warehouses} == {(1 / 8, "layer")}
    assert model.eval()(torch.empty(2, 1, 64, 64, device="meta")).shape == (2, 5)


@pytest.mark.parametrize(
    "name, out_indices, dynamic",
    paired([REGISTERED, "regnety_002", "efficientnet_b0", "vgg11_bn"], [None, (1, 2)], [KW, STATIC, "odconv"]),
)
def test_features_are_timms_for_every_model_and_method(name, out_indices, dynamic):
    options = {"features_only": True, **({} if out_indices is None else {"out_indices": out_indices})}
    ours = meta(name, n=1, dynamic=dynamic, **options).eval()
    with torch.device("meta"):
        theirs = timm.create_model(name, **options).eval()
    image = torch.empty(2, 3, 64, 64, device="meta")
    assert [feature.shape for feature in ours(image)] == [feature.shape for feature in theirs(image)]
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    assert bool(dynamic_layers(ours)) == (dynamic != STATIC)


@pytest.mark.parametrize("name", ["regnety_002", "vit_tiny_patch16_224"])
def test_features_of_other_models_leave_no_parameter_without_a_gradient(name):
    """Warehouses whose layers were all cut off would have none, and DistributedDataParallel refuses that."""
    model = meta(name, n=1, features_only=True, out_indices=(0, 1))
    size = 224 if name.startswith("vit") else 64
    sum(feature.sum() for feature in model(torch.empty(2, 3, size, size, device="meta"))).backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


def test_features_are_computed_by_the_same_weights_as_the_logits():
    model = kw.create_model("regnety_002", n=1).eval()
    features = kw.create_model("regnety_002", n=1, features_only=True).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(image, intermediates_only=True)
        for ours, theirs in zip(features(image), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_features_that_timm_does_not_give_are_refused_by_name():
    backbone = kw.backbones.Backbone("resnet18", vanilla=lambda name, **_: nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match=r"no features from resnet18.*forward_intermediates"):
        backbone.create(n=STATIC, features_only=True)


@pytest.mark.parametrize(
    ("name", "near"), [("resnet81", "resnet18"), ("regnety_02", "regnety_002"), ("kw_resnet81", "resnet18")]
)
def test_a_name_that_timm_does_not_have_is_refused_with_similar_ones(name, near):
    with pytest.raises(ValueError, match=rf"no model '{name.removeprefix('kw_')}'.*{near}"):
        kw.create_model(name)


@pytest.mark.parametrize("name", [REGISTERED, "regnety_002"])
@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"dynamic": "odcon"}, ValueError, r"'odcon'.*condconv.*odconv"),
        ({"n": "3/2"}, ValueError, r"n='3/2'"),
        ({"n": "1/2", "dynamic": "odconv"}, ValueError, r"n='1/2'.*integer"),
        ({"n": STATIC, "reduction": "1/8"}, ValueError, r"reduction.*'static': a static model"),
        ({"reduction": 2}, ValueError, r"reduction=2"),
        ({"reductoin": "1/8"}, TypeError, r"reductoin.*reduction, cell_in"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_by_key(name, kwargs, error, words):
    with pytest.raises(error, match=words):
        meta(name, **kwargs)
