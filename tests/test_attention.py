"""The contrasting-driven attention against its formula, and its temperature as saved state."""

import copy
import io
import warnings
from fractions import Fraction

import pytest
import torch
from helpers import reference
from torch import nn

import kw
from kw import KernelShape, KWConfig, Warehouse
from kw.attention import Attention

CHANNELS = 6
CONFIGS = {
    "batch": KWConfig(n=1, cell_in=1, cell_out=1),
    "layer": KWConfig(n=1, cell_in=1, cell_out=1, attention_norm="layer"),
    "n=2": KWConfig(n=2),
    "n=1/2": KWConfig(n="1/2", cell_in=1, cell_out=1),
    "n=1/4": KWConfig(n="1/4", cell_in=1, cell_out=1),
    "basis n=1/2": KWConfig(n="1/2", cell_in=1, cell_out=1, nonlocal_basis="1/16"),
    "basis n=1": KWConfig(n=1, cell_in=1, cell_out=1, nonlocal_basis="1/2", attention_norm="layer"),
}
MIXTURES = (4, 8, 4)


def build(config, position=1):
    """The attention of one of three layers of a warehouse, in float64, every parameter and statistic random."""
    warehouse = Warehouse([KernelShape(f"layer{k}", (1, 1, m)) for k, m in enumerate(MIXTURES)], config)
    attention = Attention(CHANNELS, warehouse.shares[position]).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    if config.attention_norm == "batch":
        attention.norm.running_mean.normal_()
        attention.norm.running_var.uniform_(0.5, 2)
    return attention


def expected(attention, config, position, pooled, tau):
    n, anchors, _ = reference.hand_out(MIXTURES, config.n)
    basis = {}
    if config.nonlocal_basis < 1:
        before = sum(cell is not None for own in anchors[:position] for cell in own)
        basis = {"start": before, "local": int(config.n * MIXTURES[position])}
    m = MIXTURES[position]
    z = reference.scores(attention, pooled, m, n, training=attention.training, **basis)
    return reference.contrast(z, anchors[position], tau)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("tau", [0, 0.5, 1])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_attentions_are_those_of_the_formula(name, position, tau, training):
    config = CONFIGS[name]
    attention = build(config, position).train(training)
    attention.temperature.fill_(tau)
    pooled = torch.randn(3, CHANNELS, dtype=torch.float64)
    alpha = attention(pooled)
    torch.testing.assert_close(alpha, expected(attention, config, position, pooled, tau), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_at_temperature_one_each_mixture_is_exactly_its_anchor_or_zero(name):
    attention = build(CONFIGS[name]).float()
    attention.temperature.fill_(1)
    alpha = attention(torch.randn(3, CHANNELS))
    n, anchors, _ = reference.hand_out(MIXTURES, CONFIGS[name].n)
    one_hot = torch.tensor([[float(cell == own) for cell in range(n)] for own in anchors[1]])
    assert torch.equal(alpha, one_hot.expand_as(alpha))


@torch.no_grad()
def test_zero_cell_takes_its_part_and_gives_nothing():
    """Raising the zero cell's score shrinks a mixture's other attentions and leaves their proportions."""
    attention = build(CONFIGS["layer"]).eval()
    attention.fc2.weight.zero_()
    attention.fc2.bias.fill_(1)
    pooled = torch.randn(2, CHANNELS, dtype=torch.float64)
    n = attention.cells
    torch.testing.assert_close(attention(pooled)[0, 0], torch.full((n,), 1 / (n + 1.001), dtype=torch.float64))
    attention.fc2.bias.view(-1, n + 1)[:, -1] = 101
    torch.testing.assert_close(attention(pooled)[0, 0], torch.full((n,), 1 / (n + 101.001), dtype=torch.float64))


@torch.no_grad()
def test_attentions_may_be_negative_and_their_sizes_sum_to_at_most_one():
    alpha = build(CONFIGS["batch"]).eval()(torch.randn(50, CHANNELS, dtype=torch.float64))
    assert (alpha < 0).any() and (alpha > 0).any()
    assert alpha.abs().sum(2).max() < 1


@pytest.mark.parametrize(
    ("channels", "reduction", "width"), [(512, "1/16", 32), (512, "1/32", 16), (64, "1/16", 16), (300, 0.1, 30)]
)
def test_hidden_width_is_a_share_of_the_channels_of_at_least_sixteen(channels, reduction, width):
    warehouse = Warehouse([KernelShape("layer", (4, 4))], KWConfig(reduction=reduction))
    assert Attention(channels, warehouse.shares[0]).fc1.out_features == width


@pytest.mark.parametrize("name", CONFIGS)
def test_biases_are_where_the_definition_has_them(name):
    config = CONFIGS[name]
    names = {key for key, _ in build(config).named_parameters() if key.endswith("bias")}
    basis = config.nonlocal_basis < 1
    norm = {"fc1.bias"} if config.attention_norm == "layer" else set()
    assert names == {"norm.bias", "basis_bias" if basis else "fc2.bias"} | norm


@pytest.mark.parametrize(("mixtures", "share", "basis"), [((64, 64), "1/2", 32), ((64, 64), "1/16", 16)])
def test_basis_is_a_share_of_the_other_cells_of_at_least_sixteen(mixtures, share, basis):
    config = KWConfig(n=1, cell_in=1, cell_out=1, nonlocal_basis=share)
    warehouse = Warehouse([KernelShape(f"layer{k}", (1, 1, m)) for k, m in enumerate(mixtures)], config)
    attention = Attention(CHANNELS, warehouse.shares[0])
    assert attention.fc3.weight.shape == (64, basis)
    assert attention.fc2.out_features == 64 * (64 + basis + 1)
    assert attention.basis_bias.shape == (64 * 129,)


def test_layers_start_he_normal_and_biases_at_zero():
    warehouse = Warehouse(
        [KernelShape("one", (1, 1, 64)), KernelShape("two", (1, 1, 64))],
        KWConfig(n=1, cell_in=1, cell_out=1, nonlocal_basis="1/2"),
    )
    for attention in (Attention(256, warehouse.shares[0]), Attention(256, build_plain().shares[0])):
        for layer in (attention.fc1, attention.fc2, attention.fc3):
            if layer is not None:
                std = (2 / layer.out_features) ** 0.5
                assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
                assert layer.bias is None or not layer.bias.any()
        assert (attention.norm.weight == 1).all() and (attention.norm.bias == 0).all()
        assert attention.basis_bias is None or not attention.basis_bias.any()


def build_plain():
    return Warehouse([KernelShape("layer", (8, 8, 3, 3))], KWConfig(attention_norm="layer"))


@pytest.fixture
def model():
    return kw.convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), {"0": "a", "2": "a"})


def temperatures(model):
    return {key: value.item() for key, value in model.state_dict().items() if key.endswith("temperature")}


def test_temperature_is_saved_state_and_no_parameter(model):
    kw.set_temperature(model, 0.25)
    assert temperatures(model) == {"0.attention.temperature": 0.25}  # once
    assert not any("temperature" in key for key, _ in model.named_parameters())


def test_temperature_survives_save_and_load(model):
    kw.set_temperature(model, 0.25)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    kw.set_temperature(model, 1)
    model.load_state_dict(torch.load(file, weights_only=True))
    assert set(temperatures(model).values()) == {0.25}


def test_temperature_survives_deepcopy_and_then_is_its_own(model):
    kw.set_temperature(model, 0.25)
    averaged = copy.deepcopy(model)
    kw.set_temperature(model, 0.5)
    assert set(temperatures(averaged).values()) == {0.25}


def test_temperature_of_a_fresh_model_is_zero(model):
    assert set(temperatures(model).values()) == {0}


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan")])
def test_temperature_out_of_range_is_refused_by_value(model, tau):
    with pytest.raises(ValueError, match=f"{tau}.*between 0.*and 1"):
        kw.set_temperature(model, tau)


def test_temperature_of_a_vanilla_model_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no dynamic layer.*convert"):
        kw.set_temperature(nn.Linear(2, 2), 0.5)


def test_anchors_are_no_saved_state_for_they_follow_from_the_share(model):
    assert not any(key.endswith("beta") for key in model.state_dict())


def test_batch_of_one_trains_with_frozen_statistics_without_a_warning(model):
    """As detectors train."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(torch.randn(1, 4, 8, 8)).shape == (1, 8, 4, 4)


def test_batch_of_one_without_statistics_is_refused_by_layer_with_ways_out(model):
    norm = model[0].attention.norm
    norm.running_mean = norm.running_var = None
    with pytest.raises(ValueError) as error:
        model(torch.randn(1, 4, 8, 8))
    for part in ("'0'", "batch of one", "two samples", "attention_norm='layer'"):
        assert part in str(error.value)


def test_batch_of_one_trains_with_layernorm():
    model = kw.convert(nn.Sequential(nn.Conv2d(4, 8, 3)), {"0": "a"}, KWConfig(n=1, attention_norm="layer"))
    model(torch.randn(1, 4, 8, 8)).sum().backward()
    assert model[0].attention.fc2.weight.grad.any()


@torch.no_grad()
def test_half_precision_scores_are_normalized_in_float32():
    """In bfloat16 the sum over a thousand cells, and each attention, would keep two digits."""
    config = KWConfig(n=250, cell_in=1, cell_out=1, attention_norm="layer")
    attention = Attention(CHANNELS, Warehouse([KernelShape("layer", (1, 1, 4))], config).shares[0]).bfloat16()
    pooled = torch.randn(2, CHANNELS, dtype=torch.bfloat16)
    z = attention.scores(pooled).double()
    expected = reference.contrast(z, [None] * 4, tau=0).float()
    torch.testing.assert_close(attention(pooled), expected, rtol=1e-5, atol=0)


def test_budget_beyond_published_ones_has_one_attention_row_per_mixture():
    attention = Attention(CHANNELS, Warehouse([KernelShape("layer", (8, 8))], KWConfig(n=Fraction(1, 8))).shares[0])
    assert attention.eval()(torch.randn(2, CHANNELS)).shape == (2, 8, 1)


def test_a_temperature_in_another_tensors_place_counts(model):
    """Whether tau is known to be 0 is known of one tensor, at one version of it."""
    shared = model[0].attention.shared
    assert shared.is_zero
    shared.value = torch.ones(())  # of the version that the other one had
    assert not shared.is_zero
    kw.set_temperature(model, 0)
    model[0].attention.temperature.fill_(1)
    assert not model[0].attention.shared.is_zero
    kw.set_temperature(model, 0)
    assert copy.deepcopy(model)[0].attention.shared.is_zero and model.double()[0].attention.shared.is_zero


def test_memory_that_to_empty_leaves_is_no_temperature():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 4, 3))
        kw.convert(model, {"0": "w"})
    model.to_empty(device="cpu")
    assert model[0].attention.temperature == 0
