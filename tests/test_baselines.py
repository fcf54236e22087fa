"""The dynamic convolutions to compare with: each against its definition, and whatever holds for all, for each."""

import copy
import json
import math
from argparse import ArgumentTypeError
from itertools import product

import pytest
import timm
import torch
import yaml
from helpers.implementations import force
from helpers.models import assert_unchanged, snapshot
from helpers.programs import ROOT
from helpers.selection import paired, representative
from helpers.training import config, launch
from torch import nn
from torch.nn import functional as F

import kw
from kw.backbones import BACKBONES
from kw.baselines import BASELINES, DynamicConv2d, KernelBank, register
from kw.baselines.layer import AnnealedSoftmax
from kw.config import KW, STATIC
from kw.description import build, describe
from kw.layers import DynamicLayer
from scripts.bench import cases
from scripts.bench.step_time import composed
from scripts.report.published import CLASSIFICATION, IMAGENET, published
from scripts.report.rows import sections
from scripts.report.runs import find_runs
from train.config import run_name
from train.jobs.checkpoints import newest
from train.jobs.errors import ConfigError
from train.model import build_model

METHODS = sorted(BASELINES)
CONVOLUTIONAL = [name for name in BACKBONES if not name.startswith("deit")]
GROUPS = yaml.safe_load((ROOT / "scripts/report/published.yaml").read_text())["groups"]
RIVALS = {row.id: row for row in published() if row.task == CLASSIFICATION and row.table.title != IMAGENET}
LAYERS = {  # arguments of nn.Conv2d, and pixels of the input
    "3x3": ((8, 12, 3, 1, 1), 7),
    "stride, even kernel, bias": ((6, 4, 2, 2, 0, 1, 1, True), 8),
    "dilation": ((6, 5, (3, 1), 1, (2, 0), (2, 1)), 9),
    "groups": ((8, 12, 3, 1, 1, 1, 4), 6),
    "depthwise": ((9, 9, 3, 2, 1, 1, 9), 7),
    "depthwise, twice as many out": ((6, 12, 3, 1, 1, 1, 6), 5),
    "pointwise": ((16, 8, 1), 5),
    "same": ((5, 5, 4, 1, "same", 1, 1, True), 6),
    "reflected": ((5, 6, 3, 1, 1, 1, 1, True, "reflect"), 6),
}


def layer(name, n=1, arguments=LAYERS["3x3"][0]):
    method = BASELINES[name]
    return method.layer(*arguments, **({"n": n} if method.budget else {}))


def shaken(model):
    """Every parameter and every running statistic its own number, so that none goes unnoticed."""
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not key.endswith("temperature"):
            value.copy_(torch.rand_like(value) + 0.1 if "running_var" in key else 0.3 * torch.randn_like(value))
    return model


def meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


# The definitions, one sample at a time: from the state dict, the layer's shape and a pooled input to a kernel and what
# the output is multiplied by.


def linear(state, name, x):
    weight, bias = state[f"attention.{name}.weight"], state.get(f"attention.{name}.bias")
    return torch.stack([sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]) + (
        0 if bias is None else bias
    )


def mixture(state, shares, shape):
    return sum(share * kernel for share, kernel in zip(shares, kernels(state, shape), strict=True))


def kernels(state, shape):
    """Those of a bank, `(K, *shape)`: it has them position by position."""
    return state["weight"].reshape(-1, math.prod(shape[2:]), *shape[:2]).permute(0, 2, 3, 1).reshape(-1, *shape)


def condconv(state, shape, tau, x):
    return mixture(state, 1 / (1 + torch.exp(-linear(state, "fc", x))), shape), 1


def dyconv(state, shape, tau, x):
    if len(kernels(state, shape)) == 1:
        return kernels(state, shape)[0], 1
    scores = torch.exp(linear(state, "fc2", linear(state, "fc1", x).clamp(min=0)) / (1 + 29 * tau))
    return mixture(state, scores / scores.sum(), shape), 1


def odconv(state, shape, tau, x):
    h = linear(state, "fc", x)
    mean, var, scale, shift = (
        state[f"attention.norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
    )
    h = ((h - mean) / torch.sqrt(var + 1e-5) * scale + shift).clamp(min=0)
    shares = torch.ones(1)
    if len(kernels(state, shape)) > 1:
        shares = torch.exp(linear(state, "kernel.0", h) / (1 + 29 * tau))
    kernel = mixture(state, shares / shares.sum(), shape)
    if math.prod(shape[2:]) > 1:
        kernel = kernel * linear(state, "space", h).sigmoid().reshape(shape[2:])
    channel = linear(state, "channel", h).sigmoid()
    out_per_group, groups = shape[0] * shape[1] // len(x), len(x) // shape[1]
    for o in range(shape[0]):  # the input channels that output channel o reads
        group = o // out_per_group
        kernel[o] = kernel[o] * channel[group * shape[1] : (group + 1) * shape[1]].reshape(-1, 1, 1)
    if not groups == len(x) == shape[0]:
        kernel = kernel * linear(state, "filter", h).sigmoid().reshape(-1, 1, 1, 1)
    return kernel, 1


def dcd(state, shape, tau, x):
    h = linear(state, "fc1", x).clamp(min=0)
    latent = len(state["q"])
    phi = linear(state, "phi", h).tanh().reshape(latent, latent)
    residual = torch.einsum("ol,lm,mr->or", state["p"], phi, state["q"].reshape(latent, -1))
    return linear(state, "scale", h).sigmoid().reshape(-1, 1, 1, 1) * state["weight"] + residual.reshape(shape), 1


def se(state, shape, tau, x):
    return state["weight"], lambda out: linear(
        state, "fc2", linear(state, "fc1", out.mean((1, 2))).clamp(min=0)
    ).sigmoid()


def fdconv(state, shape, tau, x):
    """Layers as narrow as these are static (tests/test_fdconv.py has dynamic ones)."""
    return state["weight"], 1


# A new method goes here too; the last test of this file asks for it. (state, shape, tau, pooled) -> (kernel, 1 or a
# function of the output `(C_out, ...)` that returns a factor for each channel).
DEFINITIONS = {method.__name__: method for method in (condconv, dyconv, odconv, dcd, se, fdconv)}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_layer_is_its_definition_sample_by_sample(name, n, kind, each_choice):
    arguments, side = LAYERS[kind]
    made = shaken(layer(name, n, arguments).double()).eval()
    tau = 0.4
    if kw.temperatures(made):
        kw.set_temperature(made, tau)
    static = nn.Conv2d(*arguments).double()
    state = {key: value.double() for key, value in made.state_dict().items()}
    images = torch.randn(3, arguments[0], side, side, dtype=torch.float64)
    found = made(images)
    for image, out in zip(images, found, strict=True):
        kernel, scale = DEFINITIONS[name](state, tuple(static.weight.shape), tau, image.mean((1, 2)))
        static.weight.data = kernel.reshape(static.weight.shape)
        if static.bias is not None:
            static.bias.data = state["bias"]
        expected = static(image[None])[0]
        if scale != 1:
            expected = expected * scale(expected).reshape(-1, 1, 1)
        torch.testing.assert_close(out, expected)


BANKS = [name for name in METHODS if issubclass(BASELINES[name].layer, KernelBank)]


@pytest.mark.parametrize("name, n, kind", paired(BANKS, [1, 3], LAYERS))
def test_gradients_are_the_same_by_every_choice(name, n, kind):
    arguments, side = LAYERS[kind]
    made = shaken(layer(name, n, arguments).double())
    images = torch.randn(3, arguments[0], side, side, dtype=torch.float64, requires_grad=True)

    def gradients(choice):
        with force(choice):
            out = made(images)
            return torch.autograd.grad(
                (out * torch.arange(out.numel()).view_as(out)).sum(), [images, *made.parameters()]
            )

    expected = gradients("grouped")
    for choice in ("auto", "batched", "blocks", *(["triton"] if kind == "3x3" else [])):
        torch.testing.assert_close(gradients(choice), expected)


def test_a_batch_of_kernels_is_not_made_where_another_implementation_is_faster():
    """By the plain choice, a sample's kernel is kept for the backward pass."""
    made = layer("odconv", 4, (128, 128, 3, 1, 1))

    def kept(choice):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t)
        with hooks, force(choice):
            made(torch.randn(64, 128, 8, 8))
        return max(sizes)

    assert kept("grouped") == 64 * 128 * 128 * 9 > 2 * kept("blocks") and kept("auto") == kept("blocks")


@pytest.mark.parametrize("name", ["dyconv", "condconv"])
@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
def test_kernelwarehouses_attention_function_in_another_method(name, tau, each_choice):
    arguments, side = LAYERS["3x3"]
    made = shaken(BASELINES[name].layer(*arguments, n=3, attention_function="caf").double()).eval()
    kw.set_temperature(made, tau)
    state, images = made.state_dict(), torch.randn(2, arguments[0], side, side, dtype=torch.float64)
    for image, out in zip(images, made(images), strict=True):
        pooled = image.mean((1, 2))
        hidden = linear(state, "fc1", pooled).clamp(min=0) if name == "dyconv" else pooled
        z = linear(state, "fc2" if name == "dyconv" else "fc", hidden)
        alpha = tau * torch.tensor([1.0, 0, 0]) + (1 - tau) * z / (z.abs().sum() + 1e-3)
        kernel = mixture(state, alpha, (arguments[1], arguments[0], 3, 3))
        torch.testing.assert_close(out, F.conv2d(image[None], kernel, state["bias"], padding=1)[0])


def test_the_attention_function_is_one_switch_of_the_methods_that_have_it():
    made = config("dynamic=dyconv", "n=4", "kw.attention_function=caf")
    assert made.name == "resnet_digits_dyconv4x+kw.attention_function-caf"
    assert len(kw.temperatures(build_model(made, 10))) == 1
    model = meta("kw_resnet18", dynamic="condconv", n=4, attention_function="caf")
    assert model.layer1[0].conv1.attention.contrast is not None
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in meta("kw_resnet18", dynamic="condconv", n=4).parameters()
    )
    for words, message in (
        (["dynamic=odconv", "kw.attention_function=caf"], r"kw\.attention_function.*odconv"),
        (["dynamic=dyconv", "kw.attention_function=tanh"], r"kw\.attention_function='tanh'.*softmax, caf"),
        (["n=static", "kw.attention_function=caf"], r"kw\.attention_function.*n=static"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(*words)


@pytest.mark.parametrize("dynamic", ["kw", *METHODS])
def test_a_model_is_traced_for_a_batch_size(dynamic):
    narrow = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
    model = timm.create_model("kw_resnet18", dynamic=dynamic, n=2, **narrow).eval()
    images, others = torch.randn(2, 8, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, images)(others), model(others), rtol=1e-3, atol=1e-4)


def shares(made, images):
    """What the annealed softmaxes of a layer return."""
    found = []
    for part in made.modules():
        if isinstance(part, AnnealedSoftmax):
            part.register_forward_hook(lambda module, inputs, output: found.append(output))
    made(images)
    return found


@pytest.mark.parametrize("name", DEFINITIONS)
def test_temperature_makes_shares_alike_and_is_saved(name):
    cold, hot = shaken(layer(name, 4)), layer(name, 4)
    hot.load_state_dict(cold.state_dict())
    if not kw.temperatures(cold):
        assert name not in ("dyconv", "odconv")
        with pytest.raises(ValueError, match="has no temperature"):
            kw.set_temperature(cold, 1)
        return
    kw.set_temperature(hot, 1)
    assert [float(t.value) for t in kw.temperatures(cold) + kw.temperatures(hot)] == [0, 1]
    images = torch.randn(5, 8, 1, 1).expand(-1, -1, 7, 7)
    assert shares(cold.eval(), images), "no softmax was found"
    for near, far in zip(*(shares(made.eval(), images) for made in (hot, cold)), strict=True):
        torch.testing.assert_close(near.sum(1), torch.ones(5))
        assert near.std(1).mean() < far.std(1).mean() / 10
    cold.load_state_dict(hot.state_dict())
    assert float(kw.temperatures(cold)[0].value) == 1


@pytest.mark.parametrize("name, by", paired(CONVOLUTIONAL, product(METHODS, [1, 4])))
def test_every_backbone_builds_by_every_method_and_adds_up(name, by):
    method, n = by
    model = meta(f"kw_{name}", dynamic=method, n=n)
    assert any(isinstance(module, BASELINES[method].layer) for module in model.modules())
    costs = kw.profile(model)
    assert (
        costs.params
        == sum(p.numel() for p in model.parameters())
        == costs.other_params + sum(c.params for c in costs.layers)
    )
    assert costs.other_macs == 0 and not costs.warehouses
    static = kw.profile(meta(f"kw_{name}", n=STATIC))
    assert costs.apply == static.macs and [c.name for c in costs.layers] == [c.name for c in static.layers]
    dynamic = [c for c in costs.layers if isinstance(model.get_submodule(c.name), DynamicConv2d)]
    kernels = sum(math.prod(model.get_submodule(c.name).kernel_shape) for c in dynamic)
    if method in ("condconv", "dyconv", "odconv") and n == 4:
        assert costs.assembly == n * kernels
    assert not any(c.assembly or c.attention for c in costs.layers if c not in dynamic)


@pytest.mark.parametrize("name, method", paired(["resnet18", "mobilenetv2_050", "convnext_tiny"], METHODS))
def test_a_step_moves_every_parameter_and_samples_are_independent(name, method, tmp_path):
    settings = {"dynamic": method, "n": 2, "num_classes": 7}
    if name == "resnet18":
        settings["channels"] = (24, 24, 32, 32)
    model = timm.create_model(f"kw_{name}", **settings).double().train()
    if kw.temperatures(model):
        kw.set_temperature(model, 0.5)
    side = 64 if method == "fdconv" else 32  # a single pixel has no frequencies to scale
    F.cross_entropy(model(torch.randn(4, 3, side, side, dtype=torch.float64)), torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key
    torch.optim.SGD(model.parameters(), lr=1e-3).step()

    model.eval()
    batch = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        together = model(batch)
        alone, size = torch.cat([model(image[None]) for image in batch]), together.abs().max().item()
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9 * size)
        assert model(batch[:0]).shape == (0, 7)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        again = timm.create_model(f"kw_{name}", **settings).double().eval()
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        torch.testing.assert_close(again(batch), together, rtol=0, atol=0)


# ODConv's release and FDConv have the parameters that are published. Of the others, papers make other layers dynamic,
# or their attentions wider: docs/methods.md.
EXACT = [name for name, row in RIVALS.items() if row.dynamic in ("static", "odconv", "kw", "fdconv")]


RUNNABLE = [name for name, row in RIVALS.items() if row.has_code]


@pytest.mark.parametrize("name", representative(RUNNABLE, lambda name: "resnet18" in name))
def test_a_rivals_experiment_is_named_and_costs_as_the_report_says(name):
    row = RIVALS[name]
    made = composed(name, [])
    assert made.name == name and (made.recipe.epochs, made.backbone.label) == (row.epochs, row.label)
    with torch.device("meta"):
        costs = kw.profile(build_model(made, 1000))
    assert (row.params, row.macs) == (costs.params, costs.macs), "numbers of scripts/report/costs.yaml"
    if name in EXACT:
        assert round(costs.params / 1e6, 2) == row.stated
    stated = next(
        (one["macs_g"] for group in GROUPS for one in group["rows"] if one["id"] == name and "macs_g" in one), 0
    )
    if stated and "resnet50" not in name:  # whose published figure is of another stride
        assert 0.94 * stated < costs.macs / 1e9 < 1.0005 * stated
    path = ROOT / "configs/experiment/rivals" / f"{name}.yaml"
    if path.exists():
        head = path.read_text()
        assert f"# python -m train experiment=rivals/{name} data.root=PATH" in head
        assert f"# Parameters: {costs.params:,} (published: {row.stated:.2f} M)." in head
        assert f"top-1 {row.scores['top1']:.2f}, top-5 {row.scores['top5']:.2f}." in head


def test_there_is_an_experiment_for_each_rival_and_no_other():
    files = {path.stem for path in (ROOT / "configs/experiment/rivals").glob("*.yaml")}
    runnable = {name for name, row in RIVALS.items() if row.has_code}
    assert files == {name for name in runnable if not (ROOT / f"configs/experiment/{name}.yaml").exists()}
    missing = {name for name in runnable if RIVALS[name].dynamic not in (*BASELINES, KW, STATIC)}
    assert not missing, "published.yaml: rows of methods that are not here have `code: none`"


def test_the_default_scope_is_that_of_odconvs_release():
    def scope(name):
        return set(kw.baselines.default_scope(meta(name)))

    assert scope("resnet18") == {f"layer{s}.{b}.conv{k}" for s in (1, 2, 3, 4) for b in (0, 1) for k in (1, 2)}
    assert len(scope("resnet50")) == 48 and not any("downsample" in name for name in scope("resnet50"))
    mobile = scope("mobilenetv2_100")
    assert "conv_head" in mobile and "conv_stem" not in mobile and len(mobile) == 51
    assert not any(".se." in name for name in scope("regnety_002"))


def test_any_model_of_convolutions_is_converted_in_place_with_its_biases():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(2, 2)).double().eval()
    bias = model[1].bias
    assert kw.baselines.convert(model, "odconv", n="4", scope=["1"]) is model
    assert type(model[0]) is nn.Conv2d and model[1].bias is bias and model[1].weight.dtype == torch.float64
    assert not model[1].training and model[1].n == 4
    with pytest.raises(ValueError, match="dynamic layers already"):
        kw.convert(model)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"name": "odcon"}, r"'odcon'.*condconv, .*dyconv, .*odconv"),
        ({"name": "odconv", "n": "1/2"}, r"n='1/2'.*integer"),
        ({"name": "odconv", "n": 0}, r"n=0"),
        ({"name": "se", "scope": ["2"]}, r"'2', a Linear.*nn\.Conv2d"),
        ({"name": "se", "scope": ["7"]}, r"'7'.*does not have"),
        ({"name": "se", "scope": lambda name, layer: False}, r"matches no layer.*0, 1"),
    ],
)
def test_what_cannot_be_converted_is_named_and_left_as_it_was(arguments, words):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(2, 2))
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        kw.baselines.convert(model, **arguments)
    assert_unchanged(model, before)


def test_other_refusals_say_what_to_do():
    with pytest.raises(ValueError, match=r"odcon.*condconv.*odconv"):
        meta("kw_resnet18", dynamic="odcon")
    with pytest.raises(ValueError, match=r"reduction.*'odconv'"):
        meta("kw_resnet18", dynamic="odconv", reduction="1/8")
    with pytest.raises(ValueError, match=r"'dyconv' has no setting 'attention': its settings are attention_function"):
        kw.baselines.convert(timm.create_model("resnet18"), "dyconv", attention="caf")
    with pytest.raises(ValueError, match="'se' has no setting 'attention': it has none"):
        kw.baselines.convert(timm.create_model("resnet18"), "se", attention="caf")
    with pytest.raises(
        ValueError, match="attention_function does not apply to dynamic='odconv', but to kw, condconv, dyconv"
    ):
        kw.baselines.convert(timm.create_model("resnet18"), "odconv", attention_function="caf")
    with pytest.raises(ArgumentTypeError, match=r"'kw4'.*by its n alone"):
        cases.parse_case("small:kw4")
    with pytest.raises(TypeError, match=r"'attention'.*Settings of dyconv are attention_function\."):
        meta("kw_resnet18", dynamic="dyconv", attention="caf")
    with pytest.raises(ArgumentTypeError, match=r"small:odcon4: 'odcon'.*condconv.*odconv"):
        cases.parse_case("small:odcon4")
    with pytest.raises(ValueError, match=r"matches no layer.*nn\.Conv2d"):
        meta("kw_deit_tiny_patch16_224", dynamic="odconv")
    model = meta("kw_resnet18", dynamic="odconv", n=4)
    with pytest.raises(ValueError, match=r"no dynamic layer with a warehouse"):
        kw.freeze(model)
    with pytest.raises(ValueError, match=r"another method.*dynamic='kw'"):
        kw.load_released(model, timm.create_model("resnet18").state_dict())
    with pytest.raises(ValueError, match=r"batch of one"):
        layer("odconv").train()(torch.randn(1, 8, 5, 5))
    with pytest.raises(ValueError, match=r"batch of shape"):
        layer("condconv")(torch.randn(8, 5, 5))


@pytest.mark.parametrize("method", METHODS)
def test_memory_formats_and_mixed_precision(method):
    model = timm.create_model("kw_mobilenetv2_050", dynamic=method, n=2, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(images).float().square().sum()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# The trainer


def test_settings_are_checked_and_runs_named_like_published_rows():
    assert config("dynamic=odconv", "n=4").name == "resnet_digits_odconv4x"
    assert config("dynamic=se", "n=4").name == config("dynamic=se").name == "resnet_digits_se"
    assert config("dynamic=se", "n=4") == config("dynamic=se", "n=1")
    for static in (["dynamic=static", "n=4"], ["dynamic=odconv", "n=static"], ["n=static"]):
        assert config(*static) == config("dynamic=static") and config(*static).name == "resnet_digits"
    with pytest.raises(ConfigError, match=r"dynamic.*odcon.*kw, static, .*condconv"):
        config("dynamic=odcon")
    with pytest.raises(ConfigError, match=r"n='1/2'.*odconv.*integer"):
        config("dynamic=odconv", "n=1/2")
    with pytest.raises(ConfigError, match=r"kw\.reduction.*odconv"):
        config("dynamic=odconv", "kw.reduction=1/8")
    made = config("backbone=timm", "backbone.name=regnety_002", "dynamic=dcd")
    assert any(isinstance(module, BASELINES["dcd"].layer) for module in build_model(made, 10).modules())


@pytest.mark.slow
def test_one_sweep_compares_methods_and_the_report_names_them(tmp_path):
    words = ["dynamic=static,se,dyconv,kw", "n=1,2", "label=r", "recipe.ema_decay=0.9", "recipe.temperature_epochs=2"]
    done = launch("-m", *words, cwd=tmp_path)
    assert done.stdout.count("Skipped, the same run") == 2 and "jobs failed" not in done.stderr
    runs, remarks = find_runs([tmp_path / "runs"])
    assert not remarks
    by_name = {run.name.partition("+")[0]: run for run in runs}
    assert by_name.keys() == {"r", "r_se", "r_dyconv1x", "r_dyconv2x", "r_kw1x", "r_kw2x"}
    made, _ = sections(runs)
    series = {row.name.partition("+")[0]: row.series for row in made[-1].rows}
    assert series == {
        "r": "resnet_digits",
        "r_kw1x": "resnet_digits",
        "r_kw2x": "resnet_digits",
        "r_se": "resnet_digits se",
        "r_dyconv1x": "resnet_digits dyconv",
        "r_dyconv2x": "resnet_digits dyconv",
    }
    metrics = {name: json.loads((run.folder / "metrics.jsonl").read_text()) for name, run in by_name.items()}
    warm = {name for name, line in metrics.items() if line["temperature"]}
    assert warm == {"r_dyconv2x", "r_kw1x", "r_kw2x"}  # one kernel has nothing to be mixed with
    state = newest(by_name["r_dyconv2x"].folder / "checkpoints").state
    for weights in (state["model"], state["ema"]):
        assert {float(value) for key, value in weights.items() if key.endswith("temperature")} == {0.5}
    again = launch("-m", *words, "dynamic=dyconv", "n=2", cwd=tmp_path)
    assert "Resumed" in again.stdout


@pytest.mark.slow
def test_the_sweep_of_the_issue_at_full_width(tmp_path):
    every = "dynamic=static,se,condconv,dyconv,dcd,odconv,kw"
    done = launch("-m", every, "n=1,4", "recipe.epochs=1", "recipe.warmup_epochs=0", cwd=tmp_path, shrunk=())
    assert done.stdout.count("Skipped, the same run") == 3
    names = {run.name.partition("+")[0] for run in find_runs([tmp_path / "runs"])[0]}
    budgeted = {f"resnet_digits_{name}{n}x" for name in ("condconv", "dyconv", "odconv", "kw") for n in (1, 4)}
    assert names == {"resnet_digits", "resnet_digits_se", "resnet_digits_dcd", *budgeted}


def test_a_published_row_stands_beside_a_run_of_its_method_and_no_other(tmp_path):
    for dynamic, top1, epochs in (("odconv", 74.0, 100), ("kw", 76.0, 300), ("kw", 75.0, 100), ("dyconv", 72.0, 100)):
        folder = tmp_path / f"{dynamic}{epochs}"
        folder.mkdir()
        summary = {"name": f"resnet18_{dynamic}4x", "backbone": "resnet18", "dynamic": dynamic, "n": "4",
                   "data": "imagenet", "top1": top1, "top5": 90.0, "seed": 0, "epochs": epochs}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    made, _ = sections(find_runs([tmp_path])[0])
    differences = [
        (row.published.id, round(row.difference("top1"), 2)) for part in made for row in part.rows if row.runs
    ]
    assert differences == [
        ("resnet18_kw4x", -0.05),
        ("resnet18_100e_dyconv4x", -0.76),
        ("resnet18_100e_odconv4x", 0.03),
        ("resnet18_100e_kw4x", 0.84),
        ("resnet18_100e_odconv4x", -0.19),  # as ODConv's release has it
    ]


@pytest.fixture
def invented():
    """A method of one class, with a setting of its own. It has a name that nobody's file will have."""

    @register("invented", budget=True, settings={"start": ("equal", "first")})
    class Invented(KernelBank):
        def __init__(self, *args, start="equal", **kwargs):
            super().__init__(*args, **kwargs)
            self.start = start

        def forward(self, x):
            shares = torch.ones(self.n) if self.start == "equal" else torch.arange(self.n, 0, -1)
            return self.add_bias(self.convolve_mixed(x, (shares / shares.sum()).to(x).expand(len(x), -1)))

    yield Invented
    del BASELINES["invented"]


def test_a_new_method_is_one_class_and_known_everywhere(invented):
    model = meta("kw_resnet18", dynamic="invented", n=3)
    assert 2 * kw.profile(model).assembly == 3 * kw.profile(meta("kw_resnet18", dynamic="condconv", n=2)).assembly
    made = config("dynamic=invented", "n=3", "backbone=resnet18", "+backbone.kwargs.start=first")
    assert made.name.startswith(run_name("resnet18", "invented", 3)) and "resnet18_invented3x+" in made.name
    layers = [module for module in build_model(made, 10).modules() if isinstance(module, invented)]
    assert {one.start for one in layers} == {"first"}
    case = cases.parse_case("small:invented3@2")
    built = cases.create(case, case.n, cases.Settings())
    assert any(isinstance(module, DynamicLayer) for module in built.modules())


def test_what_cannot_be_registered_is_said(invented):
    with pytest.raises(ValueError, match="cannot be called 'scope'"):
        register("other", budget=False, settings={"scope": ("all", "none")})
    with pytest.raises(ValueError, match=r"'invented'.*taken, by .*test_baselines"):
        register("invented", budget=False)
    for name, words in (("static", "taken"), ("eca2", "lower case letters only")):
        with pytest.raises(ValueError, match=words):
            register(name, budget=False)
    static = type("Static", (DynamicConv2d,), {})
    for layer_type, words in ((nn.Conv2d, "inherits .*DynamicConv2d"), (static, "Static.*needs a forward")):
        with pytest.raises(TypeError, match=words):
            register("another", budget=False)(layer_type)
    assert "another" not in BASELINES


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_has_the_settings_of_its_method(method, tmp_path):
    settings = {key: values[-1] for key, values in BASELINES[method].settings.items()}
    narrow = {"layers": (1, 1, 1, 1), "channels": (24, 24, 32, 32), "num_classes": 3}
    for name, chosen in (("usual", {}), *([("chosen", settings)] if settings else [])):
        model = kw.create_model("resnet18", dynamic=method, n=2, **chosen, **narrow).eval()
        kw.save(model, tmp_path / name)
        described = json.loads((tmp_path / name / "config.json").read_text())
        assert '"settings"' in json.dumps(described) if chosen else '"settings"' not in json.dumps(described)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(kw.load(tmp_path / name)(images), model(images))


def test_a_saved_models_setting_is_no_weight(invented, tmp_path):
    """Weights fit with any value of this setting: it must come from the description."""
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model = kw.baselines.convert(convolution, "invented", n=2, scope=["1"], start="first").eval()
    assert describe(model)["settings"] == {"start": "first"}
    again = build(describe(model), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    assert again[1].start == "first"
    for wrong, words in (
        ({"begin": "first"}, "settings of method 'invented' has 'begin'"),
        ({"start": "x"}, "start='x'"),
    ):
        with pytest.raises(ValueError, match=words):
            build({**describe(model), "settings": wrong}, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    with pytest.raises(ValueError, match="'settings', but no method"):
        build({key: value for key, value in describe(model).items() if key not in ("method", "n", "layers")}, model)
    lacking = copy.deepcopy(model)
    del lacking[1].start
    with pytest.raises(ValueError, match="Invented, the layer of 'invented', does not keep its setting 'start'"):
        describe(lacking)
    kw.baselines.convert(other := nn.Sequential(nn.Conv2d(3, 4, 3)), "invented", n=2, scope=["0"])
    with pytest.raises(ValueError, match="several settings: start is equal and first"):
        describe(nn.Sequential(model[1], other[0]))


def test_the_folder_is_all_that_lists_the_methods():
    files = {path.stem for path in (ROOT / "kw/baselines").glob("*.py")} - {
        "__init__",
        "layer",
        "registry",
        "conversion",
    }
    defining = {BASELINES[name].layer.__module__.rpartition(".")[2] for name in METHODS}
    assert files == defining, f"{', '.join(sorted(files - defining))}: no class in this file has @register"
    missing = sorted(BASELINES.keys() - DEFINITIONS.keys())
    assert not missing, f"write what {', '.join(missing)} computes, and add it to DEFINITIONS in this file"
    assert DEFINITIONS.keys() == BASELINES.keys()
