"""The attentions as one page: heat maps of mixtures over cells, sharing between layers, statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from scripts.attentions.statistics import MEANINGS, LayerStatistics, by_warehouse, usage, warehouse_values
from scripts.page import COLORS, figure_html, menu, notes, page, plain, section, table

MOST = 1_000_000  # attentions in a page (4 bytes each); beyond, it leaves out those by class, then the deviation
MOST_DOTS = 260  # mixtures of a warehouse; with more, anchors are not marked
OWN, OTHERS, ZERO = COLORS[0], COLORS[1], COLORS[-1]
LINE = "rgba(128, 128, 128, 0.6)"

HEAT = """A row is a mixture, a column a cell of the warehouse. Frames: the cells that the layer owns; dots: the cell
that a mixture is anchored to by the temperature. Right: how far each mixture moved from its anchor, from 0 to 1."""
SHARING = """Percent of a layer's attention (row) on the cells of each layer of its warehouse (column). The last row is
what it would be if all cells were used equally."""
USAGE = "By all mixtures of the warehouse together, relative to equal use: 1. Neighboring owners alternate in color."
CLASSES = "Half the sum of absolute differences, layers in the order in which an image passes through them."


def attentions_page(title: str, subtitle: str, layers: list[LayerStatistics], classes: list[str]) -> str:
    found = by_warehouse(layers)
    size = sum(layer.mean.numel() for layer in layers)
    shown = classes if size * (2 + 2 * len(classes)) <= MOST and len(classes) > 1 else []
    parts = [
        section(
            f"Warehouse {name}",
            f"<p>{HEAT}</p>",
            figure_html(heat_map(members, maps_of(members, shown, deviation=2 * size <= MOST))),
            '<div class="figures">',
            figure_html(sharing_figure(members), "Which layers use whose cells"),
            figure_html(usage_figure(members), "How much each cell is used"),
            f"</div><p>{SHARING}</p><p>{USAGE}</p>",
        )
        for name, members in found.items()
    ]
    parts.append(section("From the first layer to the last", figure_html(layers_figure(layers))))
    text = figure_html(classes_figure(layers, classes))
    parts.append(section("How far a class's attentions are from those of all images", f"<p>{CLASSES}</p>", text))
    return page(title, subtitle, "".join(parts) + _tables(layers, found))


def limit_of(values: Tensor) -> float:
    """Where the colors end: all but a thousandth of the values are within."""
    return max(float(np.quantile(values.abs().numpy(), 0.999)), 1e-9)


Map = tuple[str, Tensor, float]  # name, values `(m, n)`, where the colors end


def maps_of(members: list[LayerStatistics], classes: list[str], deviation: bool = True) -> list[Map]:
    """What a heat map of all layers of a warehouse can show: the mean over all images, the deviation, each class's
    mean, in the colors of the first, and that minus the mean."""
    mean = torch.cat([layer.mean for layer in members])
    limit = limit_of(mean)
    maps = [("mean over all images", mean, limit)]
    if deviation:
        spread = torch.cat([layer.deviation for layer in members])
        maps.append(("deviation over images", spread, limit_of(spread)))
    for k, name in enumerate(classes):
        values = torch.cat([layer.sums.by_class[k] / layer.sums.counts[k].clamp(min=1) for layer in members])[:, :-1]
        maps.append((f"class {name}", values, limit))
        maps.append((f"class {name}, minus the mean", values - mean, limit_of(values - mean)))
    return maps


def heat_map(members: list[LayerStatistics], maps: list[Map]) -> go.Figure:
    """As in the paper's figures: attention of each mixture to each cell; next to it, how far each mixture moved."""
    rows, cells = maps[0][1].shape
    owners = [next((layer.name for layer in members if cell in _owned(layer)), "nobody") for cell in range(cells)]
    columns = [f"{cell}, of {plain(owner)}" for cell, owner in enumerate(owners)]
    lines = [f"{plain(layer.name)}, mixture {k}" for layer in members for k in range(len(layer.shift))]
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.9, 0.1], horizontal_spacing=0.02)
    for number, (what, values, limit) in enumerate(maps):
        figure.add_heatmap(
            z=values.numpy().astype(np.float32), x=columns, y=lines, colorscale="RdBu_r", zmin=-limit, zmax=limit,
            visible=number == 0, name=plain(what), colorbar={"x": 1.02, "thickness": 12}, row=1, col=1,
            hovertemplate="%{y}<br>cell %{x}<br>%{z:.3g}",
        )  # fmt: skip
    ticks, top = [], 0
    for layer in members:
        ticks.append(lines[top + len(layer.shift) // 2])
        _mark(figure, layer, top, lines, columns, dots=rows <= MOST_DOTS)
        top += len(layer.shift)
    shift = torch.cat([layer.shift for layer in members]).tolist()
    figure.add_bar(
        x=shift, y=lines, orientation="h", marker={"color": OTHERS, "line": {"width": 0}}, showlegend=False, row=1,
        col=2, hovertemplate="%{y}<br>moved %{x:.2f}<extra></extra>",
    )  # fmt: skip
    fixed = [True] * (len(figure.data) - len(maps))
    buttons = [
        {"label": plain(what), "method": "update", "args": [{"visible": [k == n for n in range(len(maps))] + fixed}]}
        for k, (what, _, _) in enumerate(maps)
    ]
    names = [plain(layer.name) for layer in members]
    figure.update_yaxes(range=[rows - 0.5, -0.5], tickvals=ticks, ticktext=names, showgrid=False)
    step = max(cells // 12, 1)
    cell_ticks = {"tickvals": columns[::step], "ticktext": list(range(0, cells, step)), "range": [-0.5, cells - 0.5]}
    figure.update_xaxes(**cell_ticks, title_text="cell", showgrid=False, row=1, col=1)
    figure.update_xaxes(range=[0, 1], tickvals=[0, 1], title_text="moved", row=1, col=2)
    return figure.update_layout(height=min(max(6 * rows, 320), 1200) + 120, updatemenus=[menu(buttons)], bargap=0)


def _owned(layer: LayerStatistics) -> range:
    return range(layer.sums.share.start, layer.sums.share.start + layer.sums.share.owned)


def _mark(
    figure: go.Figure, layer: LayerStatistics, top: int, lines: list[str], columns: list[str], dots: bool
) -> None:
    """A frame around the layer's own cells, a line below the layer, dots at its anchors."""
    share, bottom = layer.sums.share, top + len(layer.shift)
    frame = {"x0": share.start - 0.5, "x1": share.start + share.owned - 0.5, "y0": top - 0.5, "y1": bottom - 0.5}
    figure.add_shape(type="rect", line={"color": LINE, "width": 1.5}, **frame, row=1, col=1)
    across = {"x0": -0.5, "x1": len(columns) - 0.5, "y0": bottom - 0.5, "y1": bottom - 0.5}
    figure.add_shape(type="line", line={"color": LINE, "width": 0.6}, **across, row=1, col=1)
    own = [(columns[cell], lines[top + row]) for row, cell in enumerate(share.anchors or ()) if cell < len(columns)]
    if own and dots:
        x, y = zip(*own, strict=True)
        marker = {"color": "#000000", "size": 3}
        figure.add_scatter(x=x, y=y, mode="markers", marker=marker, hoverinfo="skip", showlegend=False, row=1, col=1)


def sharing_figure(members: list[LayerStatistics]) -> go.Figure:
    names = [plain(layer.name) for layer in members]
    even = torch.tensor([*(layer.even for layer in members), 0.0])
    shares = 100 * torch.stack([*(layer.by_owner for layer in members), even]).numpy()
    return _table_map(shares, [*names, "zero cell"], [*names, "all cells equally"], "%{z:.0f}", 100)


def usage_figure(members: list[LayerStatistics]) -> go.Figure:
    figure = go.Figure()
    used = usage(members)
    for number, layer in enumerate(members):
        cells = list(_owned(layer))
        color, name = COLORS[number % 2], plain(layer.name)
        hover = f"cell %{{x}}, of {name}: %{{y:.2f}}<extra></extra>"
        figure.add_bar(x=cells, y=used[cells].tolist(), marker_color=color, hovertemplate=hover, showlegend=False)
    figure.add_hline(1, line={"color": LINE, "dash": "dash"})
    return figure.update_xaxes(title_text="cell").update_layout(bargap=0.1)


def layers_figure(layers: list[LayerStatistics]) -> go.Figure:
    """Where attention goes; how far it moved, and how much it depends on the image and on its class."""
    names = [plain(layer.name) for layer in layers]
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    for key, color in (("own", OWN), ("others", OTHERS), ("zero", ZERO)):
        shares = [getattr(layer, key) for layer in layers]
        figure.add_bar(x=names, y=shares, name=f"{key}: {MEANINGS[key]}", marker_color=color, row=1, col=1)
    for key in ("moved", "dynamic", "by_class"):
        values = [getattr(layer, key) for layer in layers]
        if None not in values:
            figure.add_scatter(x=names, y=values, name=f"{key}: {MEANINGS[key]}", mode="lines+markers", row=2, col=1)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    return figure.update_layout(barmode="stack", height=680, legend=legend, margin_t=150)


def classes_figure(layers: list[LayerStatistics], classes: list[str]) -> go.Figure:
    values = torch.stack([layer.classes for layer in layers], dim=1).numpy()  # (K, layers)
    names = [plain(layer.name) for layer in layers]
    return _table_map(values, names, [plain(name) for name in classes], "%{z:.2f}", None)


def _table_map(values: Any, columns: list[str], rows: list[str], text: str, most: float | None) -> go.Figure:
    """A heat map with its values written into it."""
    figure = go.Figure(
        go.Heatmap(
            z=values.astype(np.float32), x=columns, y=rows, texttemplate=text, colorscale="Blues", zmin=0, zmax=most,
            showscale=False, hovertemplate="%{y}<br>%{x}<br>%{z:.3g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(type="category", tickangle=-60, showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure.update_layout(height=180 + 22 * len(rows))


def _tables(layers: list[LayerStatistics], found: dict[str, list[LayerStatistics]]) -> str:
    keys = list(MEANINGS)
    rows = [[layer.name, layer.warehouse, *(cell(getattr(layer, key)) for key in keys)] for layer in layers]
    by = [[name, str(len(members)), *map(cell, warehouse_values(members).values())] for name, members in found.items()]
    meanings = notes([f"{key}: {text}" for key, text in MEANINGS.items()])
    return section("Layers", table(["layer", "warehouse", *keys], rows, 2), meanings) + section(
        "Warehouses", table(["warehouse", "layers", *keys], by, 1)
    )


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
