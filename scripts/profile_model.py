"""What a model costs, layer by layer, and which layers share which warehouse: a table, and a picture of the sharing.

    python -m scripts.profile_model backbone=resnet18 n=1/4                224 pixels, 1000 classes
    python -m scripts.profile_model experiment=resnet50_kw1d2x out=report/resnet50.png
    python -m scripts.profile_model backbone=resnet18 dynamic=odconv n=4
    python -m scripts.profile_model backbone=timm backbone.name=regnety_002 n=1/2 kw.reduction=1/32

For a timm model without published warehouses it first prints the plan of the conversion: which layers share a
warehouse, what that costs, and why others stay static.

out          the picture
all other keys are those of `python -m train`; the data are ImageNet's, unless you say otherwise

The picture has a line for each layer. Left: the cells of its warehouse, all of which it mixes, in pale color; those
that it owns in full color; and the number of its mixtures. Right: the multiply-adds of one image. The model is built on
the meta device and nothing is computed, so its size does not matter.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

import kw
from kw.backbones import BACKBONES
from kw.config import KW, STATIC
from kw.profiling import LayerCost, LayerShare, Profile, WarehouseCost
from scripts.options import imagenet_defaults, make_folder, one_line_errors, parse
from train.config import SettingsConfig, TrainConfig, compose
from train.jobs.errors import writing
from train.model import build_model

CLASSES = 1000
COLORS = plt.get_cmap("tab10").colors  # of warehouses, in turn
GRAY = "#9aa3ad"
SHADES = {"apply": 1.0, "assembly": 0.55, "attention": 0.25}  # parts of a layer's multiply-adds
LABELS = {"apply": "convolution or product", "assembly": "assembly of kernels", "attention": "attention"}
LINE = 0.19  # inches


@dataclass
class Options:
    out: str = "report/sharing.png"


def composed(overrides: list[str]) -> TrainConfig:
    """As of `python -m train`, with ResNet18 and ImageNet's image size where nothing else is named."""
    keys = {word.partition("=")[0] for word in overrides}
    backbone = [] if keys & {"backbone", "experiment"} else ["backbone=resnet18"]
    return compose([*imagenet_defaults(overrides), *backbone, *overrides])


def plan_of(config: TrainConfig) -> kw.Plan | None:
    """The plan by which a backbone without published warehouses is converted; None for the others."""
    if config.dynamic != KW or config.backbone.name.removeprefix("kw_") in BACKBONES:
        return None
    with torch.device("meta"):
        model = build_model(replace(config, n=STATIC, dynamic=STATIC, kw=SettingsConfig()), classes_of(config))
        return kw.plan(model, config.n, config=kw.KWConfig(**config.kw.changes()))


def classes_of(config: TrainConfig) -> int:
    return config.data.num_classes or CLASSES


def profile_of(config: TrainConfig) -> Profile:
    size = config.data.image_size
    with torch.device("meta"):
        model = build_model(config, classes_of(config))
        return kw.profile(model, (3, size, size))


def draw(profile: Profile, title: str, path: Path) -> None:
    """One warehouse below the other, static layers last; lines are layers, in module order."""
    costs = {layer.name: layer for layer in profile.layers}
    static = [layer for layer in profile.layers if layer.warehouse is None]
    lines = sum(len(w.shares) + 1.6 for w in profile.warehouses) + len(static) + 1.6
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, LINE * lines + 1.3), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    top, ticks = 0.0, {}
    for number, warehouse in enumerate(profile.warehouses):
        color = COLORS[number % len(COLORS)]
        _title(left, top, _describe(warehouse), color)
        for line, share in enumerate(warehouse.shares):
            y = top + 1 + line
            _draw_share(left, y, share, warehouse.cells[0], color)
            _draw_cost(right, y, costs[share.layer], color)
            ticks[y] = share.layer
        top += len(warehouse.shares) + 1.6
    if static:
        _title(left, top, "layers without warehouse", GRAY)
    for line, layer in enumerate(static):
        _draw_cost(right, top + 1 + line, layer, GRAY)
        ticks[top + 1 + line] = layer.name
    _finish(left, right, ticks, lines)
    figure.suptitle(f"{title}: {profile.params:,} parameters, {profile.macs:,} multiply-adds per image", fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _describe(warehouse: WarehouseCost) -> str:
    n, o, i = warehouse.cells
    return f"{warehouse.name}: {n} cells of {o} x {i} for {warehouse.mixtures} mixtures (n = {warehouse.budget})"


def _title(axes: Any, y: float, text: str, color: Any) -> None:
    axes.text(0, y, text, va="center", fontsize=8.5, fontweight="bold", color=color)


def _draw_share(axes: Any, y: float, share: LayerShare, cells: int, color: Any) -> None:
    """The warehouse's cells as one bar of width 1, whatever their number."""
    axes.barh(y, 1, 0.72, color=color, alpha=0.15)
    axes.barh(y, share.owned / cells, 0.72, left=share.start / cells, color=color)
    text = f"{share.mixtures} mixtures, {share.owned} own" if share.owned else f"{share.mixtures} mixtures, none own"
    axes.text(1.01, y, text, va="center", fontsize=7, color="#555555")


def _draw_cost(axes: Any, y: float, cost: LayerCost, color: Any) -> None:
    left = 0.0
    for part, alpha in SHADES.items():
        value = getattr(cost, part) / 1e6
        axes.barh(y, value, 0.72, left=left, color=color, alpha=alpha)
        left += value


def _finish(left: Any, right: Any, ticks: dict[float, str], lines: float) -> None:
    left.set(xlim=(0, 1.28), ylim=(lines, -0.8), xticks=[])
    left.set_yticks(list(ticks), list(ticks.values()), fontsize=7.5)
    left.set_xlabel("cells of the warehouse: mixed by the layer (pale), its own (full)", loc="left", fontsize=9)
    right.set_xlabel("multiply-adds of one image (millions)", fontsize=9)
    right.grid(axis="x", alpha=0.3)
    right.set_axisbelow(True)
    shades = [Patch(facecolor="#333333", alpha=alpha, label=LABELS[part]) for part, alpha in SHADES.items()]
    right.legend(handles=shades, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        axes.tick_params(axis="y", length=0)


def main(words: list[str]) -> None:
    with one_line_errors():
        options, overrides = parse(Options, words, __doc__)
        config = composed(overrides)
        make_folder(Path(options.out).parent)
        plan = plan_of(config)
        if plan is not None:
            print(f"{plan}\n")
        profile = profile_of(config)
    print(profile)
    with one_line_errors(), writing(Path(options.out)):
        draw(profile, f"{config.backbone.label}, {config.dynamic}, n = {config.n}", Path(options.out))
    print(f"\nThe picture is {options.out}.")


if __name__ == "__main__":
    main(sys.argv[1:])
