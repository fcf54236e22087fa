"""The paper's tables: an experiment for each row, set exactly as published.yaml says; a make target for each table."""

import re
import shutil

import pytest
import torch
import yaml
from helpers.programs import ROOT, command, run
from helpers.selection import representative
from helpers.training import config
from timm.layers import DropPath

import kw
from kw.config import KWConfig
from scripts.report.published import CLASSIFICATION, COSTS, IMAGENET, departures, published
from train.config import to_plain
from train.model import build_model
from train.optim import build_optimizer
from train.schedule import learning_rate

PUBLISHED = yaml.safe_load((ROOT / "scripts/report/published.yaml").read_text())
ROWS = {row["id"]: row for row in PUBLISHED["imagenet"]}
EXPERIMENTS = {path.stem for path in (ROOT / "configs/experiment").glob("*.yaml")}


@pytest.fixture(scope="module")
def models():
    """Each row's configuration and model, the latter without memory."""
    made = {}
    for row in ROWS:
        composed = config(f"experiment={row}", "data.root=anywhere")
        with torch.device("meta"):
            made[row] = composed, build_model(composed, 1000)
    return made


def test_there_is_an_experiment_for_each_row_and_no_other():
    assert set(ROWS) == EXPERIMENTS and len(ROWS) == 22 and len(PUBLISHED["coco"]) == 8


def rates_change_within_an_epoch(recipe):
    steps = 10
    middle = steps * recipe.epochs // 2
    return learning_rate(middle, steps, recipe) != learning_rate(middle + 1, steps, recipe)


def exempt_from_decay(model, recipe):
    """Which parameters the optimizer does not decay, in published.yaml's words, or by name."""
    groups = build_optimizer(model, recipe).param_groups
    assert {group["weight_decay"] for group in groups} == {0, recipe.weight_decay}
    ours = {parameter for group in groups if not group["weight_decay"] for parameter in group["params"]}
    rule = {parameter for name, parameter in model.named_parameters() if parameter.ndim <= 1 or name.endswith("bias")}
    odd = [name for name, parameter in model.named_parameters() if (parameter in ours) != (parameter in rule)]
    return odd or "one-dimensional parameters and biases"


@pytest.mark.parametrize("row", ROWS)
def test_an_experiment_is_set_as_published(row, models):
    known, (made, model) = ROWS[row], models[row]
    assert (made.name, made.n, made.backbone.name) == (row, known["n"] or "static", known["backbone"])
    assert (made.data.name, made.data.num_classes, made.data.image_size) == ("imagenet", 1000, 224)
    if known.get("params_exact"):
        assert sum(parameter.numel() for parameter in model.parameters()) == known["params_exact"]
    if known["recipe"] not in PUBLISHED["recipes"]:  # DeiT's, which was not released
        return
    recipe, settings = made.recipe, {**PUBLISHED["recipes"][known["recipe"]], **known["settings"]}
    ours = {
        **vars(recipe),
        **vars(recipe.augment),
        "global_batch": recipe.batch_size,
        "eval_crop": made.data.image_size,
        "per": "step" if rates_change_within_an_epoch(recipe) else "epoch",
        "no_decay": exempt_from_decay(model, recipe),
    }
    if "transform" in settings:
        assert settings.pop("transform") == "RandomResizedCrop(224) bilinear + horizontal flip"
        plain = {
            "interpolation": "bilinear",
            "scale": [0.08, 1.0],
            "hflip": 0.5,
            "auto_augment": None,
            "color_jitter": 0,
        }
        assert {key: ours[key] for key in plain} == plain
    assert {key: ours[key] for key in settings} == settings  # every key of the row is looked at


@pytest.mark.parametrize("row", ROWS)
def test_warehouses_have_the_published_settings(row, models):
    known, (_, model) = ROWS[row], models[row]
    warehouses = [module for module in model.modules() if isinstance(module, kw.Warehouse)]
    if known["n"] is None:
        assert not warehouses
        return
    settings = known.get("kw") or {}
    for key, value in settings.items():
        if key != "plan":  # MobileNetV2 at n = 1/2, whose warehouses are tested one by one elsewhere
            found = {getattr(warehouse.config, "n" if key == "cells" else key) for warehouse in warehouses}
            assert found == {
                getattr(KWConfig(**{"n" if key == "cells" else key: value}), "n" if key == "cells" else key)
            }
    if "nonlocal_basis" not in settings:
        assert {warehouse.config.nonlocal_basis for warehouse in warehouses} == {1}


@pytest.mark.parametrize("row", ["resnet18_kw1x", "resnet50_kw4x", "convnext_tiny_kw1x", "mobilenetv2_100_kw1x"])
def test_drop_path_is_as_published(row, models):
    _made, model = models[row]
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    rate = ROWS[row]["settings"].get("drop_path", 0)
    if row.startswith("resnet"):
        assert rates and set(rates) == {rate}  # constant over blocks
    elif rate:
        assert max(rates) == pytest.approx(rate) and rates == sorted(rates)  # linear
    else:
        assert not rates


@pytest.mark.parametrize("row", ROWS)
def test_a_header_tells_command_parameters_and_published_figures(row, models):
    known, text = ROWS[row], (ROOT / f"configs/experiment/{row}.yaml").read_text()
    count = sum(parameter.numel() for parameter in models[row][1].parameters())
    assert text.splitlines()[1] == f"# python -m train experiment={row} data.root=PATH"
    assert f"# Parameters: {count:,}" in text
    if known["params_m"] is not None:
        assert f"(published: {known['params_m']:.2f} M)" in text
    if known["top1"] is not None:
        assert f"# Published: top-1 {known['top1']:.2f}, top-5 {known['top5']:.2f}." in text


# Of each table one row: all are counted by the same functions, and each one's parameters are compared above.
@pytest.mark.parametrize("row", representative(ROWS, lambda row: row.endswith(("_kw1x", "deit_tiny_kw4x"))))
def test_the_reports_costs_are_those_of_the_models(row, models):
    with torch.device("meta"):
        costs = kw.profile(models[row][1])
    assert yaml.safe_load(COSTS.read_text())[row] == {"params": costs.params, "macs": costs.macs}


def test_the_report_finds_no_departure_in_a_rows_own_settings_and_each_in_others(models):
    rows = {row.id: row for row in published() if row.table.title == IMAGENET}
    assert rows.keys() == ROWS.keys()
    for name, row in rows.items():
        assert departures(to_plain(models[name][0]), row) == []
    changed = config(
        "experiment=resnet18_kw1x", "data.root=x", "recipe.lr=0.1", "recipe.drop_path=0", "kw.reduction=1/8"
    )
    found = departures(to_plain(changed), rows["resnet18_kw1x"])
    assert sorted(text.split()[0] for text in found) == ["kw.reduction", "recipe.drop_path", "recipe.lr"]


def test_a_tables_rows_are_found_by_glob(tmp_path):
    done = run("train", "-m", "experiment=glob(resnet18*)", "data.root=nowhere", cwd=tmp_path, code=1)
    failed = set(re.findall(r"experiment=(\S+) data.root=nowhere: ConfigError", done.stderr))
    assert failed == {row for row in ROWS if row.startswith("resnet18")} and "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_there_is_a_make_target_for_each_table(tmp_path):
    done, asked = set(), {row["backbone"].removesuffix("_patch16_224") for row in PUBLISHED["imagenet"]}
    (tmp_path / "ready").touch()
    plain = ["make", "-n", "-f", str(ROOT / "Makefile"), "-C", str(ROOT), f"VENV={tmp_path}", "-o", f"{tmp_path}/ready"]
    for table in asked:
        said = command(*plain, f"table-{table}", "DATA=here").stdout
        (pattern,) = re.findall(r"'experiment=glob\((\S+)\*\)' data.root=here", said)
        done |= {row for row in ROWS if row.startswith(pattern)}
    assert done == set(ROWS)
    said = command(*plain, "table-rivals", "DATA=here").stdout
    names = re.search(r"-m train -m experiment=(\S+) data.root=here", said)[1].split(",")
    assert set(names) == {f"rivals/{path.stem}" for path in (ROOT / "configs/experiment/rivals").glob("*.yaml")}
    said = command(*plain, "table-coco", "DATA=here").stdout
    names = re.search(r"-m detection -m config=(\S+) data.root=here", said)[1].split(",")
    assert names == [row.name for row in published() if row.task != CLASSIFICATION and row.has_code]
    without = command(*plain, "table-resnet18", check=False)
    assert without.returncode != 0 and "DATA=PATH" in without.stderr


@pytest.mark.skipif(not (ROOT / "detection/configs").is_dir(), reason="detection is not here")
def test_each_coco_row_has_its_configuration():
    for row in published():
        if row.task != CLASSIFICATION and row.has_code:
            assert (ROOT / f"detection/configs/{row.name}.py").is_file()
