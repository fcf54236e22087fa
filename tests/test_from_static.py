"""Starting from a trained static model (`from_weights`)."""

import copy

import pytest
import timm
import torch
from torch import nn

import kw
from kw import KWConfig


def trained(name, **kwargs):
    """A model whose norms have statistics that are not those of initialization."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=7, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


class Kinds(nn.Module):
    """A layer of each kind, one with padding that is not symmetric."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding="same"),
            nn.Conv2d(16, 32, (3, 1), stride=2, padding=(1, 0), padding_mode="reflect"),
            nn.Conv2d(32, 32, 3, groups=4, dilation=2, bias=False),
            nn.Conv2d(32, 32, 3, groups=32),
            nn.Conv2d(32, 24, 1),
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.layers(x).flatten(2).transpose(1, 2))


SCOPE = {**{f"layers.{k}": f"w{k}" for k in range(5)}, "head": "head"}
SETTINGS = [
    {},
    {"n": 4},
    {"n": 2, "cell_in": "1/2", "cell_out": "1/4"},
    {"partition": "channel"},
    {"partition": "none"},
]


@pytest.mark.parametrize("settings", [*SETTINGS, {"n": 4, "nonlocal_basis": "1/2"}], ids=str)
def test_at_temperature_1_outputs_are_the_static_models_for_every_kind_of_layer(settings):
    static = Kinds().double().eval()
    model = kw.convert(copy.deepcopy(static), SCOPE, KWConfig(**{"n": 1, **settings}), from_weights=True)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    kw.set_temperature(model, 1)
    torch.testing.assert_close(model(x), static(x), rtol=1e-10, atol=1e-12)
    kw.set_temperature(model, 0)
    for name in SCOPE:  # each kernel is 1 / (1 + 1e-3) times the static one
        layer, kernel = model.get_submodule(name), static.get_parameter(f"{name}.weight")
        made = layer.kernels(torch.randn(2, layer.attention.fc1.in_features, dtype=torch.float64))
        torch.testing.assert_close(made, (kernel / 1.001).reshape(*kernel.shape[:2], -1).expand_as(made))


@pytest.mark.parametrize("name, n", [("resnet18", 1), ("mobilenetv2_050", 4), ("deit_tiny_patch16_224", 2)])
def test_published_backbones_start_from_timms_weights(name, n):
    size = {"img_size": 64} if "deit" in name else {}
    static = trained(name, **size)
    model = kw.create_model(name, n=n, num_classes=7, from_weights=True, **size).eval()
    kw.load_static(model, static.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = static(x)
        kw.set_temperature(model, 1)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        kw.set_temperature(model, 0)
        assert (model(x) - expected).abs().max() < 0.1 * expected.abs().max()


def test_every_parameter_that_follows_an_anchor_learns():
    model = kw.convert(trained("resnet26", in_chans=3), config=KWConfig(n=2), from_weights=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


def test_layers_with_two_names_and_modules_with_extra_state_are_kept():
    class Extra(nn.Conv2d):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            assert state == {"a": 1}

    static = nn.Sequential(Extra(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1))
    static.append(static[1])
    model = kw.convert(copy.deepcopy(static), {"1": "a"}, KWConfig(), from_weights=True)
    kw.set_temperature(model, 1)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), static(x))
    other = kw.convert(copy.deepcopy(static), {"1": "a"}, KWConfig())
    kw.load_static(other, static.state_dict())
    kw.set_temperature(other, 1)
    torch.testing.assert_close(other(x), static(x))


def test_a_published_backbone_is_built_from_its_own_static_weights():
    torch.manual_seed(3)
    static = kw.create_model("resnet18", n="static", num_classes=7).eval()
    torch.manual_seed(3)
    model = kw.create_model("resnet18", n=2, num_classes=7, from_weights=True).eval()
    kw.set_temperature(model, 1)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), static(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": "1/2"}, "n=1/2 has fewer cells"),
        ({"anchoring": "all_to_one"}, "one_to_one"),
        ({"attention_function": "softmax"}, "caf"),
    ],
    ids=str,
)
def test_settings_without_a_place_for_kernels_are_refused_before_anything_changes(settings, message):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match=message):
        kw.convert(model, {"1": "a"}, KWConfig(**settings), from_weights=True)
    assert type(model[1]) is nn.Conv2d


def test_weights_of_another_model_are_refused_by_entry_and_change_nothing():
    model = kw.create_model("resnet18", num_classes=7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for other, message in (
        (timm.create_model("resnet26", num_classes=7), r"'layer1\.0\.bn3\.bias' is left over"),
        (timm.create_model("resnet18", num_classes=8), r"'fc\.weight' has shape \(8, 512\), not \(7, 512\)"),
        (model, "attention.fc1.weight' is left over"),
    ):
        with pytest.raises(ValueError, match=message):
            kw.load_static(model, other.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
