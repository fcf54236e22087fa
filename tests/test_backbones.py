"""The seven backbones: that they build at every budget, count as published, and behave as timm's models do."""

from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers.selection import paired, representative
from timm.layers.drop import DropPath

import kw
from kw.backbones import BACKBONES
from kw.config import STATIC
from kw.layers import KWLayer
from kw.warehouse import Warehouse

BUDGETS = [STATIC, "1/8", "1/4", "1/2", 1, 2, 3, 4, 8]
PUBLISHED = {
    row["id"]: row
    for row in yaml.safe_load((Path(__file__).parents[1] / "scripts/report/published.yaml").read_text())["imagenet"]
    if row.get("params_exact")
}
CONVOLUTIONAL = [name for name in BACKBONES if not name.startswith("deit")]
# The smallest of each family.
FAMILIES = ("resnet18", "mobilenetv2_050", "convnext_tiny", "deit_tiny_patch16_224")
# One budget each for the tests that compute, so that together they meet small, whole and large ones.
COMPUTED = {
    "resnet18": "1/4",
    "resnet50": "1/2",
    "mobilenetv2_100": 4,
    "mobilenetv2_050": "1/2",
    "convnext_tiny": 1,
    "deit_tiny_patch16_224": "1/2",
    "deit_small_patch16_224": 1,
}


def meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def small(name, **kwargs):
    """A backbone for images of 32 pixels and a few classes."""
    size = {"img_size": 32} if name.startswith("deit") else {}
    return timm.create_model(f"kw_{name}", n=COMPUTED[name], num_classes=7, **size, **kwargs)


def images(batch):
    return torch.randn(batch, 3, 32, 32)


def warehouses(model):
    return [module for module in model.modules() if isinstance(module, Warehouse)]


def test_timm_lists_the_seven():
    assert len(BACKBONES) == 7
    assert set(timm.list_models("kw_*")) == {f"kw_{name}" for name in BACKBONES}


@pytest.mark.parametrize("name, n", paired(BACKBONES, BUDGETS))
def test_every_backbone_builds_at_every_budget(name, n):
    model = meta(f"kw_{name}", n=n)
    assert any(isinstance(module, KWLayer) for module in model.modules()) == (n != STATIC)
    if n == STATIC:
        vanilla = meta(name).state_dict()
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in vanilla.items()}
    elif Fraction(n) >= 1:
        assert {warehouse.config.n for warehouse in warehouses(model)} == {Fraction(n)}
    else:
        assert {warehouse.config.n for warehouse in warehouses(model)} <= {Fraction(n), Fraction(1)}


@pytest.mark.parametrize("row", PUBLISHED)
def test_parameters_are_as_many_as_in_the_published_row(row):
    row = PUBLISHED[row]
    model = meta(f"kw_{row['backbone']}", n=STATIC if row["n"] is None else row["n"])
    assert sum(parameter.numel() for parameter in model.parameters()) == row["params_exact"]


@pytest.mark.parametrize("name, out_indices, n", paired(BACKBONES, [None, (1, 3)], [STATIC, 1]))
def test_features_are_those_of_the_vanilla_model(name, out_indices, n):
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    ours = meta(f"kw_{name}", n=n, features_only=True, **chosen).eval()
    theirs = meta(name, features_only=True, **chosen).eval()
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    assert ours.feature_info.module_name() == theirs.feature_info.module_name()
    image = torch.empty(2, 3, 224, 224, device="meta")
    assert [feature.shape for feature in ours(image)] == [feature.shape for feature in theirs(image)]


@pytest.mark.parametrize("name, out_indices", paired(BACKBONES, [None, (0, 1)]))
def test_features_leave_no_parameter_without_a_gradient(name, out_indices):
    """Distributed training refuses parameters that a model does not use: warehouses of layers cut off, for one."""
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    size = {"img_size": 32} if name.startswith("deit") else {}
    model = meta(f"kw_{name}", n=1, features_only=True, **size, **chosen)
    sum(feature.sum() for feature in model(torch.empty(2, 3, 32, 32, device="meta"))).backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("name", representative(BACKBONES, FAMILIES.__contains__))
def test_more_budget_is_more_parameters(name):
    models = [meta(f"kw_{name}", n=n) for n in ("1/8", "1/2", 1, 2)]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_small_patch16_224"])
def test_deit_shares_by_stages_of_four_blocks_with_layer_norm_in_the_attention(name):
    found = warehouses(meta(f"kw_{name}", n=4))
    layers = {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2")}
    assert {warehouse.name: [share.kernel.name for share in warehouse.shares] for warehouse in found} == {
        f"stage{stage}_{part}": [
            f"blocks.{block}.{part}.{layer}" for block in range(4 * stage, 4 * stage + 4) for layer in layers[part]
        ]
        for stage in range(3)
        for part in layers
    }
    assert {warehouse.config.attention_norm for warehouse in found} == {"layer"}


def test_features_are_computed_by_the_same_weights_as_the_logits():
    model = timm.create_model("kw_mobilenetv2_050", n=1).eval()
    features = timm.create_model("kw_mobilenetv2_050", n=1, features_only=True).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    image = images(2)
    with torch.no_grad():
        expected = model.forward_intermediates(image, intermediates_only=True)
        for ours, theirs in zip(features(image), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "overrides",
    [
        {"reduction": "1/8"},
        {"cell_in": "1/4", "cell_out": "1/2"},
        {"nonlocal_basis": "1/8"},
        {"attention_norm": "layer"},
    ],
    ids=lambda overrides: ", ".join(overrides),
)
def test_settings_among_the_keywords_reach_every_warehouse(overrides):
    expected = kw.KWConfig(**overrides)
    found = warehouses(meta("kw_resnet18", n="1/4", **overrides))
    assert found
    for key in overrides:
        assert {getattr(warehouse.config, key) for warehouse in found} == {getattr(expected, key)}


def test_settings_are_refused_without_warehouses():
    with pytest.raises(ValueError, match=r"reduction.*static"):
        meta("kw_resnet18", n=STATIC, reduction="1/8")


@pytest.mark.parametrize("n", [1, STATIC])
def test_pretrained_weights_are_refused_with_the_way_to_load_some(n):
    with pytest.raises(RuntimeError, match=r"kw_resnet18.*pretrained=False.*kw\.load_released"):
        meta("kw_resnet18", n=n, pretrained=True)


@pytest.mark.parametrize("n", [0, -1, "1/0", "3/2"])
def test_bad_budget_is_refused_through_timm(n):
    with pytest.raises(ValueError, match="n="):
        meta("kw_resnet18", n=n)


@pytest.mark.parametrize("name", representative(BACKBONES, FAMILIES.__contains__))
def test_classes_and_channels_are_timms(name):
    model = meta(f"kw_{name}", n="1/2", num_classes=7, in_chans=4).eval()
    assert model.num_classes == 7
    assert model(torch.empty(2, 4, 224, 224, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name, n", paired(FAMILIES, ["1/2", 1]))
def test_reset_classifier(name, n):
    model = meta(f"kw_{name}", n=n).eval()
    with torch.device("meta"):
        model.reset_classifier(5)
    image = torch.empty(2, 3, 224, 224, device="meta")
    assert model(image).shape == (2, 5)
    model.reset_classifier(0)
    assert model(image).shape == (2, model.num_features if name in CONVOLUTIONAL[:2] else model.head_hidden_size)


@pytest.mark.parametrize("n", [1, STATIC])
@pytest.mark.parametrize("name, blocks", [("resnet18", 8), ("resnet50", 16)])
def test_drop_path_of_a_resnet_is_constant(name, blocks, n):
    model = meta(f"kw_{name}", n=n, drop_path_rate=0.1)
    assert [module.drop_prob for module in model.modules() if isinstance(module, DropPath)] == [0.1] * blocks
    plain = meta(f"kw_{name}", n=n)
    assert not any(isinstance(module, DropPath) and module.drop_prob for module in plain.modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_a_step_of_training_moves_every_parameter_and_samples_are_independent(name):
    model = small(name).train()
    kw.set_temperature(model, 0.5)
    logits = model(images(4))
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    none = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not none
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
    torch.optim.SGD(model.parameters(), lr=1e-3).step()

    model.eval()
    batch = images(2)
    with torch.no_grad():
        together = model(batch)
        alone = torch.cat([model(image[None]) for image in batch])
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4 * together.abs().max().item())
