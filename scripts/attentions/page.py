"""The attentions as one page: assets/attentions.js draws the heat maps from what is packed here."""

from __future__ import annotations

import base64
import html
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.attentions.pictures import limit_of
from scripts.attentions.statistics import MEANINGS, LayerStatistics, by_warehouse, usage, warehouse_values
from scripts.webpage import page, table

MOST = 4_000_000  # attentions in a page; beyond, it leaves out those by class

BODY = """
<section class="card"><div class="bar"><h2>Mean attention of each mixture to each cell</h2>
<label>warehouse <select id="warehouse"></select> show <select id="what"></select></label></div>
<p class="note">A line is a mixture, a column a cell. Frames: the cells that are the layer's own; dots: the cell a
mixture was anchored to by the temperature. <span id="scale"></span></p><div id="heat"></div></section>
<div class="cards">
<section class="card"><h2>Who draws from whom</h2><p class="note">Percent of a layer's attention (line) on the cells of
each layer of its warehouse (column); the last line is what it would be if all cells were used alike.</p>
<div id="sharing" class="wide"></div></section>
<section class="card"><h2>How much each cell is used</h2><p class="note">By all mixtures of the warehouse together,
relative to an even use: 1.</p><div id="usage"></div></section>
</div>
<section class="card"><h2>How far a class's attentions are from those of all images</h2>
<p class="note">Layers in the order in which an image meets them; half the sum of absolute differences.</p>
<div id="classes" class="wide"></div></section>
"""


def attentions_page(title: str, subtitle: str, layers: list[LayerStatistics], classes: list[str]) -> str:
    found = by_warehouse(layers)
    size = sum(layer.mean.numel() for layer in layers)
    shown = classes if size * (2 + len(classes)) <= MOST and len(classes) > 1 else []
    data = {
        "classes": shown,
        "distances": [[layer.name, _rounded(layer.classes)] for layer in layers],
        "names": classes,
        "warehouses": [_warehouse(name, drawing, len(shown)) for name, drawing in found.items()],
    }
    return page(title, subtitle, BODY + _tables(layers, found), data, "attentions.js")


def _warehouse(name: str, drawing: list[LayerStatistics], classes: int) -> dict[str, Any]:
    """The maps: the mean, the deviation, and how far each class's mean is from that of all."""
    mean = torch.cat([layer.mean for layer in drawing])
    maps = {"mean": mean, "deviation": torch.cat([layer.deviation for layer in drawing])}
    for number in range(classes):
        means = [layer.sums.by_class[number] / layer.sums.counts[number].clamp(min=1) for layer in drawing]
        maps[str(number)] = torch.cat(means)[:, :-1] - mean
    layers = []
    for layer in drawing:
        share = layer.sums.share
        own = {"start": share.start, "owned": share.owned, "mixtures": share.mixtures, "anchors": share.anchors or []}
        layers.append({"name": layer.name, **own, "drawn": _rounded(layer.drawn), "shift": _rounded(layer.shift)})
    packed = {key: _packed(values) for key, values in maps.items()}
    return {"name": name, "cells": mean.shape[1], "layers": layers, "maps": packed, "usage": _rounded(usage(drawing))}


def _packed(values: Tensor) -> dict[str, Any]:
    """As bytes from -127 to 127, which stand for -limit to limit: a thousandth is beyond and cut."""
    limit = limit_of(values)
    small = (values / limit * 127).round().clamp(-127, 127).numpy().astype(np.int8)
    return {"limit": limit, "bytes": base64.b64encode(small.tobytes()).decode()}


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]


def _tables(layers: list[LayerStatistics], found: dict[str, list[LayerStatistics]]) -> str:
    keys = list(MEANINGS)
    names = ["layer", "warehouse", *keys]
    rows = [[layer.name, layer.warehouse, *(_cell(getattr(layer, key)) for key in keys)] for layer in layers]
    by = [[name, str(len(drawing)), *(_cell(value) for value in warehouse_values(drawing).values())]
          for name, drawing in found.items()]  # fmt: skip
    meanings = "".join(f"<li><b>{key}</b>: {html.escape(text)}</li>" for key, text in MEANINGS.items())
    return (
        f'<section class="card"><h2>Layers</h2>{table(names, rows, 2)}<ul>{meanings}</ul></section>'
        f'<section class="card"><h2>Warehouses</h2>{table(["warehouse", "layers", *keys], by, 1)}</section>'
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
