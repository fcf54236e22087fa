"""The attentions as pictures: heat maps of mixtures over cells, who draws from whom, statistics by layer and class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor

from scripts.attentions.statistics import LayerStatistics, by_warehouse

OWN, OTHERS, ZERO = "#2a6fdb", "#ee8a1d", "#9aa3ad"


def draw_all(layers: list[LayerStatistics], classes: list[str], folder: Path) -> list[str]:
    """Write all pictures; their names."""
    names = []
    for warehouse, drawing in by_warehouse(layers).items():
        draw_heat_map(warehouse, drawing, folder / f"cells_{warehouse}.png")
        names.append(f"cells_{warehouse}.png")
    draw_sharing(layers, folder / "sharing.png")
    draw_layers(layers, folder / "layers.png")
    draw_classes(layers, classes, folder / "classes.png")
    return [*names, "sharing.png", "layers.png", "classes.png"]


def limit_of(values: Tensor) -> float:
    """Where the colors end: all but a thousandth of the values are within."""
    return max(float(np.quantile(values.abs().numpy(), 0.999)), 1e-9)


def draw_heat_map(warehouse: str, drawing: list[LayerStatistics], path: Path) -> None:
    """As in the paper's figures: mean attention of each mixture (a line) to each cell (a column); a frame around the
    cells that are the layer's own, a dot where a mixture was anchored. Beside it, how far each mixture moved."""
    values = torch.cat([layer.mean for layer in drawing])
    mean, limit = values.numpy(), limit_of(values)
    shift = torch.cat([layer.shift for layer in drawing]).numpy()
    rows, cells = mean.shape
    height = min(max(rows * 0.06, 3.2), 14)
    size = (9.5, height + 1)
    figure, (heat, moved) = plt.subplots(1, 2, figsize=size, width_ratios=(12, 1), sharey=True, layout="constrained")
    image = heat.imshow(mean, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    ticks, top = [], 0
    for layer in drawing:
        _mark(heat, layer, top, dots=rows <= 120)
        ticks.append(top + len(layer.shift) / 2 - 0.5)
        top += len(layer.shift)
        for axes in (heat, moved):
            axes.axhline(top - 0.5, color="#555555", linewidth=0.6)
    heat.set_yticks(ticks, [layer.name for layer in drawing], fontsize=7.5)
    heat.set(xlabel="cell", title=f"{warehouse}: mean attention of {rows} mixtures to {cells} cells")
    moved.barh(range(rows), shift, 1.0, color=OTHERS)
    moved.set(xlim=(0, 1), xticks=[0, 1], title="moved")
    figure.colorbar(image, ax=[heat, moved], fraction=0.04, pad=0.02, extend="both")
    _save(figure, path)


def _mark(axes: Any, layer: LayerStatistics, top: int, dots: bool) -> None:
    share, rows = layer.sums.share, len(layer.shift)
    frame = (share.start - 0.5, top - 0.5)
    axes.add_patch(Rectangle(frame, share.owned, rows, fill=False, edgecolor="black", linewidth=1.1, clip_on=False))
    own = [(cell, top + row) for row, cell in enumerate(share.anchors or ()) if cell < layer.mean.shape[1]]
    if own and dots:
        axes.scatter(*zip(*own, strict=True), s=4, color="black", linewidths=0)


def draw_sharing(layers: list[LayerStatistics], path: Path) -> None:
    """For each warehouse, the share of a layer's attention (line) on the cells of each layer (column)."""
    found = by_warehouse(layers)
    columns = min(len(found), 3)
    lines = -(-len(found) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 4.6 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(found) :]:
        axes.axis("off")
    for axes, (warehouse, drawing) in zip(grid.flat, found.items(), strict=False):
        shares = 100 * torch.stack([layer.drawn for layer in drawing]).numpy()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        size = 8 if len(drawing) <= 10 else 5
        for (row, column), share in np.ndenumerate(shares):
            color = "white" if share > 55 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=size, color=color)
        names = [layer.name for layer in drawing]
        even = "".join(f"{100 * layer.even:.0f}, " for layer in drawing)
        axes.set_xlabel(f"if all cells were used alike: {even}0", fontsize=8)
        axes.set_xticks(range(len(names) + 1), [*names, "zero cell"], rotation=60, ha="right", fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)
        axes.set_title(f"{warehouse}: percent of a layer's attention\non the cells of ...", fontsize=9)
    _save(figure, path)


def draw_layers(layers: list[LayerStatistics], path: Path) -> None:
    """From the first layer to the last: where attention goes, how far it moved, how much it depends on the image."""
    places = np.arange(len(layers))
    figure, (shares, lines) = plt.subplots(
        2, 1, figsize=(max(7, 0.3 * len(layers) + 3), 7), sharex=True, layout="constrained"
    )
    bottom = np.zeros(len(layers))
    for key, color, label in (
        ("own", OWN, "own cells"),
        ("others", OTHERS, "other layers' cells"),
        ("zero", ZERO, "zero cell"),
    ):
        values = np.array([getattr(layer, key) for layer in layers])
        shares.bar(places, values, 0.8, bottom=bottom, color=color, label=label)
        bottom += values
    shares.set(ylabel="share of attention", title="Where the attention of a layer's mixtures goes", ylim=(0, 1))
    shares.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    if all(layer.moved is not None for layer in layers):
        moved = [layer.moved for layer in layers]
        lines.plot(places, moved, "o-", color=OTHERS, label="moved from the anchors (0 to 1)")
    lines.plot(places, [layer.dynamic for layer in layers], "s-", color=OWN, label="dynamic: deviation over images")
    if all(layer.by_class is not None for layer in layers):
        lines.plot(
            places, [layer.by_class for layer in layers], "^-", color="#12a594", label="share of it between classes"
        )
    lines.set_xticks(places, [layer.name for layer in layers], rotation=70, ha="right", fontsize=7)
    lines.set(ylim=(0, None), title="How far it moved, and what it depends on")
    lines.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    lines.grid(alpha=0.3)
    _save(figure, path)


def draw_classes(layers: list[LayerStatistics], classes: list[str], path: Path) -> None:
    """How far the mean attentions of a class are from those of all images, by layer."""
    values = torch.stack([layer.classes for layer in layers], dim=1).numpy()  # (K, layers)
    size = (max(7, 0.28 * len(layers) + 3), max(3, 0.25 * len(classes) + 2.6))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(values, cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=70, ha="right", fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set(ylabel="class", title="How far a class's attentions are from those of all images")
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
