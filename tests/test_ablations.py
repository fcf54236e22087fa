"""The paper's ablations: each switch of KWConfig against its definition, on every backbone, and through the trainer."""

import io
import json
import math
import re
from fractions import Fraction

import pytest
import timm
import torch
import yaml
from helpers import reference
from helpers.programs import ROOT, run
from helpers.selection import paired
from helpers.training import config, launch
from torch import nn

import kw
from kw import KernelShape, KWConfig, Warehouse
from kw.anchoring import at_random, own_cells
from kw.attention import Attention
from kw.backbones import BACKBONES
from kw.config import CHOICES
from kw.folding import fold
from kw.layers import KWLayer
from kw.sharing import regroup
from scripts.attentions.collect import collect
from scripts.attentions.statistics import layer_statistics
from scripts.report.rows import sections
from scripts.report.runs import find_runs
from train.config import to_plain
from train.jobs.errors import ConfigError
from train.model import build_model

SWITCHES = [
    (key, value)
    for key in ("attention_function", "anchoring", "sharing", "partition")
    for value in CHOICES[key][1:]  # the first is the published one
]
FOLDER = ROOT / "configs/experiment/ablation"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
UNANCHORED = [("attention_function", "contrast"), ("anchoring", "none")]
switched = pytest.mark.parametrize("key, value", SWITCHES)


# Attention function and anchoring

CHANNELS, MIXTURES = 6, (4, 8, 4)  # of a layer's input; of the layers of a warehouse


def expected_anchors(anchoring, n, budget):
    """Of the middle one of three layers, by the rules in words; None for the zero cell and for no anchor."""
    m = MIXTURES[1]
    return {
        "one_to_one": reference.hand_out(MIXTURES, budget)[1][1],
        "all_to_one": [0] * m,
        "random": at_random(MIXTURES, n, "house")[1],  # which ones is tested below
        "none": [None] * m,
    }[anchoring]


@pytest.mark.parametrize("tau", [0, 0.25, 1])
@pytest.mark.parametrize("settings", [{"n": 2}, {"n": "1/2"}, {"n": "1/2", "nonlocal_basis": "1/16"}], ids=str)
@pytest.mark.parametrize("anchoring", CHOICES["anchoring"])
@pytest.mark.parametrize("function", CHOICES["attention_function"])
@torch.no_grad()
def test_attentions_are_those_of_the_formula(function, anchoring, settings, tau):
    chosen = KWConfig(cell_in=1, cell_out=1, attention_function=function, anchoring=anchoring, **settings)
    kernels = [KernelShape(f"layer{k}", (1, 1, m)) for k, m in enumerate(MIXTURES)]
    attention = Attention(CHANNELS, Warehouse(kernels, chosen, name="house").shares[1]).double().eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    attention.temperature.fill_(tau)
    budget, n, m = chosen.n, int(sum(MIXTURES) * chosen.n), MIXTURES[1]
    basis = {"start": int(MIXTURES[0] * budget), "local": int(m * budget)} if "nonlocal_basis" in settings else {}
    pooled = torch.randn(3, CHANNELS, dtype=torch.float64)
    z = reference.scores(attention, pooled, m, n, **basis)
    in_force = 0 if function == "contrast" or anchoring == "none" else tau
    expected = reference.contrast(z, expected_anchors(anchoring, n, budget), in_force, function)
    torch.testing.assert_close(attention(pooled), expected, rtol=1e-10, atol=1e-12)


def test_random_anchors_are_pinned_for_a_checkpoint_has_no_anchors_in_it():
    assert at_random([3, 5], 4, "stage0") == [[1, 0, 1], [3, 0, 1, 3, 1]]
    assert at_random([3, 5], 4, "stage1") != at_random([3, 5], 4, "stage0")
    (many,) = at_random([4000], 4, "stage0")
    assert all(abs(many.count(cell) - 1000) < 150 for cell in range(4))


@pytest.mark.parametrize("anchoring", CHOICES["anchoring"][1:])
def test_cells_need_not_come_out_even_where_anchors_do_not_hand_them_out(anchoring):
    kernels = [KernelShape(f"layer{k}", (1, 1, m)) for k, m in enumerate((5, 4, 2))]
    uneven = KWConfig(n="1/2", cell_in=1, cell_out=1, anchoring=anchoring)
    warehouse = Warehouse(kernels, uneven)
    owned = [cell for share in warehouse.shares for cell in range(share.start, share.start + share.owned)]
    assert owned == list(range(len(warehouse.cells))) == list(range(5))
    assert all(share.owned - share.mixtures / 2 in (-0.5, 0, 0.5) for share in warehouse.shares)


@pytest.mark.parametrize("n", ["1/4", "1/2", 1, 4])
def test_own_cells_are_as_many_as_the_published_rule_hands_out(n):
    cells, layers, _ = reference.hand_out([8, 24, 16], Fraction(n))
    handed_out = [sum(cell is not None for cell in own) * max(int(Fraction(n)), 1) for own in layers]
    assert own_cells([8, 24, 16], cells, Fraction(n)) == handed_out


# Kernel partition

LAYERS = {
    "conv": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (3, 8, 7, 6)),
    "grouped": (lambda: nn.Conv2d(8, 12, (1, 3), groups=2, bias=False), (3, 8, 5, 6)),
    "depthwise": (lambda: nn.Conv1d(8, 8, 3, groups=8), (3, 8, 7)),
    "volume": (lambda: nn.Conv3d(4, 8, 2), (3, 4, 3, 4, 5)),
    "linear": (lambda: nn.Linear(8, 12), (3, 5, 8)),
}


def converted(layer, **settings):
    model = kw.convert(nn.Sequential(layer()), {"0": "house"}, KWConfig(attention_norm="layer", **settings)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("partition", CHOICES["partition"])
@pytest.mark.parametrize("function", ["caf", "contrast", "softmax", "tanh"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_their_definition(name, function, partition, each_choice):
    layer, size = LAYERS[name]
    chosen = {"attention_function": function, "partition": partition, "anchoring": "all_to_one"}
    model = converted(layer, n=2, **({} if partition == "none" else {"cell_out": "1/2"}), **chosen)
    kw.set_temperature(model, 0.25)
    tau = 0 if function == "contrast" else 0.25
    x = torch.randn(size, dtype=torch.float64)
    static, cells = layer().double(), model[0].warehouse.cells
    shape = static.weight.shape
    positions = math.prod(shape[2:])
    side, span = {"spatial_channel": (2, 1), "channel": (2, positions), "none": (1, positions)}[partition]
    mixtures = positions // span * side
    assert cells.shape == (2 * mixtures, shape[0] // side, shape[1] * span)
    expected = reference.forward(model[0], static, x, [0] * mixtures, tau, cells, function, span)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)
    kernels = model[0].kernels(x.movedim(-1, 1).flatten(2).mean(2) if name == "linear" else x.flatten(2).mean(2))
    assert kernels.shape == (3, *shape[:2], positions)


@pytest.mark.parametrize("partition", CHOICES["partition"])
def test_cells_start_with_the_same_deviation_however_kernels_are_cut(partition):
    """He normal over all of a layer's own cells: fan-out is the kernel's, times its cells across the input."""
    chosen = KWConfig(cell_out=1 if partition == "none" else "1/2", partition=partition)
    warehouse = Warehouse([KernelShape(f"layer{k}", (64, 64, 3, 3)) for k in range(2)], chosen)
    for share in warehouse.shares:
        own = warehouse.cells[share.start : share.start + share.owned]
        assert own.numel() == 64 * 64 * 9
        assert own.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)


def test_kernels_that_cannot_share_cells_are_refused_by_both_layers():
    kernels = [KernelShape("one", (8, 8, 3, 3)), KernelShape("two", (16, 8, 3, 3)), KernelShape("three", (8, 8, 1, 1))]
    with pytest.raises(ValueError, match=r"'one' and 'three'.*partition='channel'"):
        Warehouse(kernels, KWConfig(partition="channel"))
    with pytest.raises(ValueError, match=r"'one' and 'two'.*partition='none'"):
        Warehouse(kernels, KWConfig(partition="none"))


def test_whole_kernels_have_cells_of_whole_sides_at_any_budget():
    assert KWConfig(n="1/4").replace(partition="none").cell_in == 1


# Sharing range


def facts(model, name):
    """What a layer of a vanilla model may have in common with others: its kind, kernel size, kernel shape."""
    layer = model.get_submodule(name)
    groups = getattr(layer, "groups", 1)
    dense = "linear" if isinstance(layer, nn.Linear) else "conv"
    return dense if groups == 1 else "depthwise", tuple(layer.weight.shape[2:]), tuple(layer.weight.shape)


def published_sharing(name, n):
    with torch.device("meta"):
        model = timm.create_model(f"kw_{name}", n=n)
    return {w.name: [share.kernel.name for share in w.shares] for w in model.modules() if isinstance(w, Warehouse)}


def regrouped(name, n, **settings):
    with torch.device("meta"):
        model = timm.create_model(name)
    published = published_sharing(name, n)
    made, configs = regroup(model, published, dict.fromkeys(published, KWConfig(n=n, **settings)))
    assert set(configs) == set(made)
    return model, published, made


@pytest.mark.parametrize("name, partition, sharing", paired(BACKBONES, CHOICES["partition"], ["stage", "none", "kind"]))
def test_layers_share_if_and_only_if_stage_kind_and_kernel_say_so(name, partition, sharing):
    model, published, made = regrouped(name, 1, sharing=sharing, partition=partition)
    common = {}
    for warehouse, layers in published.items():
        for layer in layers:
            kind, size, shape = facts(model, layer)
            common[layer] = (
                warehouse,
                layer if sharing == "none" else None,
                (kind, size) if sharing == "kind" else None,
                {"spatial_channel": None, "channel": size, "none": shape}[partition],
            )
    groups = {}
    for layer, what in common.items():
        groups.setdefault(what, []).append(layer)
    order = {layer: k for k, (layer, _) in enumerate(model.named_modules())}
    assert sorted(made.values()) == sorted(sorted(layers, key=order.get) for layers in groups.values())
    whole = [layers for layers in groups.values() if layers in published.values()]
    assert all(warehouse in made for warehouse, layers in published.items() if layers in whole), (
        "these keep their names"
    )


MODEL_WIDE = {
    ("resnet18", "1"): [["stage0", "stage1", "stage2", "stage3"]],
    ("convnext_tiny", "1"): [
        ["stem"],
        ["downsample1", "downsample2", "downsample3"],
        [f"stage{s}_depthwise" for s in range(4)],
        [f"stage{s}_pointwise" for s in range(4)],
    ],
    ("mobilenetv2_050", "1/2"): [
        ["stem"],
        ["classifier"],
        [f"stage{s}_depthwise" for s in range(1, 7)],
        ["stage6_expansion", "stage6_projection"],
    ],
    ("deit_tiny_patch16_224", "1"): [[f"stage{s}_{part}" for s in range(3) for part in ("attn", "mlp")]],
}


@pytest.mark.parametrize("name, n", MODEL_WIDE)
def test_model_wide_sharing_joins_what_has_layers_of_a_kind_and_no_other(name, n):
    _, published, made = regrouped(name, n, sharing="model")
    expected = [sorted(layer for part in parts for layer in published[part]) for parts in MODEL_WIDE[name, n]]
    assert sorted(map(sorted, made.values())) == sorted(expected)


def test_warehouses_of_different_settings_are_not_joined_silently():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    settings = {"a": KWConfig(sharing="model"), "b": KWConfig(sharing="model", n=2)}
    with pytest.raises(ValueError, match=r"sharing='model'.*'a' \(layer '0'\).*'b' \(layer '1'\).*differ"):
        kw.convert(model, {"0": "a", "1": "b"}, settings)
    kw.convert(model, {"0": "a", "1": "b"}, KWConfig(sharing="model"))
    assert [share.kernel.name for share in model.warehouses["a_to_b"].shares] == ["0", "1"]


@pytest.mark.parametrize("sharing", CHOICES["sharing"])
def test_planned_warehouses_are_regrouped_too(sharing):
    with torch.device("meta"):
        model = kw.convert(
            timm.create_model("vit_tiny_patch16_224", img_size=64),
            config=KWConfig(n="1/2", sharing=sharing, partition="channel"),
        )
        model.eval()(torch.empty(1, 3, 64, 64))
    layers = [module for module in model.modules() if isinstance(module, KWLayer)]
    assert all(layer.warehouse.config.sharing == sharing for layer in layers)
    assert sharing != "none" or len(model.warehouses) == len(layers)


# Every backbone

SMALL = {
    "resnet": {"layers": [1, 2, 1, 1], "channels": [16, 16, 32, 32], "stem_width": 16},
    "mobilenetv2": {},
    "convnext": {"depths": (1, 2, 1, 1), "dims": (16, 32, 32, 64)},
    "deit": {"img_size": 32, "depth": 5, "embed_dim": 48, "num_heads": 3},
}


def small(name, **settings):
    shrunk = next(kwargs for family, kwargs in SMALL.items() if name.startswith(family))
    return timm.create_model(f"kw_{name}", n=1, num_classes=5, **shrunk, **settings)


@pytest.mark.parametrize("name, switch", paired(BACKBONES, SWITCHES))
def test_every_backbone_steps_under_every_switch_or_is_refused_by_key_and_layer(name, switch):
    key, value = switch
    if name.startswith("mobilenetv2") and (key, value) == ("sharing", "model"):
        with pytest.raises(ValueError, match=r"'blocks\.0\.0\.conv_.*more layers.*sharing='model' now"):
            small(name, **{key: value})
        return
    model = small(name, **{key: value}).train()
    kw.set_temperature(model, 0.5)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name
    for warehouse in (module for module in model.modules() if isinstance(module, Warehouse)):
        assert warehouse.cells.grad.flatten(1).any(1).all(), f"a cell of {warehouse.name} is not learnt"
    model.eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4 * together.abs().max().item())


@pytest.mark.parametrize("name, n", paired(BACKBONES, ["1", "1/2"]))
def test_settings_of_the_real_size_are_built_or_refused_by_key_and_layer(name, n):
    refused = set()
    for key, value in [("sharing", "none"), ("sharing", "model"), ("partition", "channel"), ("partition", "none")]:
        try:
            with torch.device("meta"):
                timm.create_model(f"kw_{name}", n=n, **{key: value})
        except ValueError as error:
            refused.add((key, value))
            assert f"{key}={value!r}" in str(error) and re.search(r"'\w+\.[\w.]+'", str(error)), error
    # Layers of one warehouse must be multiples of one cell: that of a whole model does not always divide them all.
    assert refused <= {("sharing", "model")}


# What is done with models


def tiny(**settings):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 1))
    return kw.convert(model, {"0": "a", "3": "a", "4": "b"}, KWConfig(**settings))


@switched
def test_a_saved_model_computes_the_same_when_loaded(key, value):
    model, file = tiny(**{key: value}).eval(), io.BytesIO()
    kw.set_temperature(model, 0.5)
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = tiny(**{key: value}).eval()
    nn.init.zeros_(other[0].attention.fc2.weight)
    other.load_state_dict(torch.load(file, weights_only=True))
    image = torch.randn(2, 4, 8, 8)
    assert torch.equal(other(image), model(image))


@switched
@pytest.mark.parametrize("tau", [0, 0.5, 1])
@pytest.mark.usefixtures("fold_all")
@torch.no_grad()
def test_freezing_changes_no_output(tau, key, value):
    model = tiny(**{key: value}).double().eval()
    kw.set_temperature(model, tau)
    image = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    expected = model(image)
    report = kw.freeze(model, memory=1e3)
    torch.testing.assert_close(model(image), expected, rtol=1e-9, atol=1e-10)
    anchored = (key, value) not in UNANCHORED
    assert report.static == (3 if tau == 1 and anchored else 0)
    linear = value not in ("softmax", "sigmoid", "tanh")
    assert report.folded == (3 if linear and (tau == 0 or not anchored) else 0)
    assert linear or tau or all(f"{value} does not fold" in row.kernel for row in report.layers)


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "tanh"])
def test_folding_what_does_not_fold_is_refused_by_layer(function):
    with pytest.raises(ValueError, match=rf"'3': attention_function='{function}'"):
        fold(tiny(attention_function=function)[3])


@switched
def test_released_checkpoints_are_of_published_settings_alone(key, value):
    with torch.device("meta"):
        model = small("resnet18", **{key: value})
    for call in (lambda: kw.load_released(model, {}), lambda: kw.to_released(model)):
        with pytest.raises(ValueError, match=rf"'layer1\.0\.conv1' has {key}='{value}'"):
            call()


@switched
def test_a_profile_counts_what_there_is(key, value):
    model = tiny(**{key: value})
    costs = kw.profile(model, (4, 8, 8))
    assert costs.params == sum(parameter.numel() for parameter in model.parameters())
    assert costs.other_macs == 0 and sum(len(w.layers) for w in costs.warehouses) == 3
    weights = {"0": 8 * 4 * 9, "3": 8 * 8 * 9, "4": 16 * 8}
    cells = {layer: warehouse.cells[0] for warehouse in costs.warehouses for layer in warehouse.layers}
    assert {c.name: c.assembly for c in costs.layers if c.warehouse} == {k: weights[k] * cells[k] for k in weights}
    assert str(costs)


@switched
def test_attentions_are_shown(key, value):
    model = tiny(**{key: value})
    made = collect(model, [(torch.randn(6, 4, 8, 8), torch.arange(6) % 2)], ["x", "y"])
    for name, sums in made.layers.items():
        found = layer_statistics(name, sums)
        anchored = (key, value) not in UNANCHORED
        assert [found.moved is not None, found.kept is not None, found.anchored is not None] == [anchored] * 3
        assert found.own + found.others + found.zero == pytest.approx(1) and found.mean.isfinite().all()


# Settings and experiments


def test_whole_kernels_are_not_cut():
    for side in ("cell_in", "cell_out"):
        with pytest.raises(ValueError, match=rf"{side}=1/2 cuts kernels, which partition='none' does not"):
            KWConfig(partition="none", **{side: "1/2"})
        with pytest.raises(ConfigError, match=rf"kw\.{side}=1/2 cuts kernels"):
            config("kw.partition=none", f"kw.{side}=0.5")
    assert KWConfig(n="1/2", partition="none").cell_in == KWConfig(n="1/2").replace(partition="none").cell_in == 1
    with pytest.warns(UserWarning, match=r"'stage3' \(3 cells for 3 mixtures at n = 1/2\)|and 7 more"):
        timm.create_model("kw_resnet18", n="1/2", partition="none")


@pytest.mark.parametrize("key", CHOICES)
def test_a_bad_value_is_named_with_the_good_ones(key):
    with pytest.raises(ValueError, match=rf"{key}='other' must be .*{CHOICES[key][0]}"):
        KWConfig(**{key: "other"})
    with pytest.raises(ConfigError, match=rf"kw\.{key}='other' must be .*{CHOICES[key][-1]}"):
        config(f"kw.{key}=other")


@pytest.mark.parametrize("key", CHOICES)
def test_defaults_are_the_published_ones(key):
    assert getattr(KWConfig(), key) == CHOICES[key][0]


@pytest.fixture(scope="module")
def composed():
    return {name: config(f"experiment/ablation={name}", "data.root=x") for name in EXPERIMENTS}


def test_each_switch_has_its_experiment(composed):
    changes = [made.kw.changes() for made in composed.values()]
    same = {("anchoring", "none")}  # as attention_function=contrast
    assert all({key: value} in changes for key, value in set(SWITCHES) - same)
    assert {"1/4", "1/8", "1/32"} == {one["reduction"] for one in changes if "reduction" in one}
    assert {made.recipe.temperature_epochs for made in composed.values()} == {5, 10, 20, 40}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_differs_from_its_reference_in_one_thing_and_is_built(name, composed):
    def learnt(made):
        plain = to_plain(made)
        return {**plain["kw"], **plain["recipe"], "n": made.n, "backbone": made.backbone.name}

    ours, base = learnt(composed[name]), learnt(composed["reference"])
    assert sum(ours[key] != base[key] for key in base) == (name != "reference")
    assert base["epochs"] == 100 and base["backbone"] == "resnet18"
    with torch.device("meta"):
        model = build_model(composed[name], 1000)
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"# python -m train experiment/ablation={name} data.root=PATH" in text
    assert f"# Parameters: {sum(parameter.numel() for parameter in model.parameters()):,}." in text


def test_ablations_are_swept_by_glob_each_in_a_folder_of_its_own(tmp_path):
    done = run("train", "-m", "experiment/ablation=glob(attention_*)", "data.root=nowhere", cwd=tmp_path, code=1)
    failed = set(re.findall(r"experiment/ablation=(\S+) data.root=nowhere: ConfigError", done.stderr))
    assert failed == {name for name in EXPERIMENTS if name.startswith("attention_")} and len(failed) == 4


def test_runs_of_ablations_are_rows_of_their_own_in_the_report(tmp_path, composed):
    for made in composed.values():
        folder = tmp_path / made.name / "seed0"
        folder.mkdir(parents=True)
        summary = {"name": made.name, "backbone": made.backbone.label, "n": made.n, "data": "imagenet", "seed": 0}
        summary |= {"top1": 50.0, "top5": 60.0, "params": 10, "macs": 20, "images_per_second": 1.0, "epochs": 100}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(made)))
        (folder / "metrics.jsonl").write_text('{"epoch": 0, "top1": 50.0, "top5": 60.0}\n')
    runs, remarks = find_runs([tmp_path])
    made, left_out = sections(runs)
    assert not remarks and not left_out
    (others,) = [section for section in made if section.title == "Other runs"]
    assert {row.name for row in others.rows} == {made.name for made in composed.values()}
    assert len(others.rows) == len(EXPERIMENTS)


def test_a_run_on_digits_trains_and_a_sweep_gives_each_its_folder(tmp_path):
    launch("-m", "kw.attention_function=caf,softmax", "kw.sharing=model", cwd=tmp_path)
    found = [yaml.safe_load(path.with_name("config.yaml").read_text())["kw"] for path in tmp_path.rglob("summary.json")]
    assert sorted(kw["attention_function"] for kw in found) == ["caf", "softmax"]
    assert [kw["sharing"] for kw in found] == ["model", "model"]
