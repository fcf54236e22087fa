"""The report as one page: for each table, accuracy against cost, learning curves, and the table itself."""

from __future__ import annotations

from statistics import mean
from typing import Any

from plotly import graph_objects as go

from kw.config import KW, STATIC, parse_budget
from scripts.page import COLORS, figure_html, menu, notes, page, plain, section, table
from scripts.report import tables
from scripts.report.published import CLASSIFICATION, LABELS
from scripts.report.rows import NO_CODE, NOT_RUN, UNFINISHED, Row, Section

AXES = {
    "backbone_params": "parameters of the backbone alone",
    "params": "parameters",
    "macs": "multiply-adds per image",
    "hours": "device-hours of training",
    "images_per_second": "images per second of training",
}
LEGEND = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
Sizes = dict[tuple[str, str], int | None]


def report_page(made: list[Section], remarks: list[str]) -> str:
    """The page's text: a section for each table, and for each data set of the other runs; those with runs first."""
    rows = [row for section in made for row in section.rows]
    sizes = {(row.backbone, row.n): row.params for row in rows if _is_backbone(row)}
    known = {row.published.id for row in rows if row.published}
    run = {row.published.id for row in rows if row.published and row.runs}
    count = sum(row.seeds for row in rows)
    subtitle = f"{count} run{'s' if count != 1 else ''}; {len(run)} of {len(known)} published rows run"
    parts = sorted((part for section in made for part in _split(section)), key=lambda part: part.empty)
    body = "".join(_section(part, sizes) for part in parts)
    body += section("Skipped or unfinished", notes(remarks)) if remarks else ""
    return page("KernelWarehouse: measured and published", subtitle, body)


def _is_backbone(row: Row) -> bool:
    return row.task == CLASSIFICATION and row.dynamic in (KW, STATIC)


def _split(part: Section) -> list[Section]:
    """Runs that are not of the paper, by data set."""
    if part.published:
        return [part]
    names = sorted({row.data for row in part.rows})
    return [
        Section(part.title if name == "-" else name, part.task, [r for r in part.rows if r.data == name], None)
        for name in names
    ]


def _section(part: Section, sizes: Sizes) -> str:
    classes = ["missing" if row.state in (NOT_RUN, NO_CODE) else "" for row in part.rows]
    rows = [tables.cells(row, part) for row in part.rows]
    text = table(tables.head(part), rows, tables.left(part), classes)
    figures = (("Accuracy against cost", cost_figure(part, sizes)), ("Learning curves", curves_figure(part)))
    shown = "".join(figure_html(figure, title) for title, figure in figures if figure.data)
    return section(part.title, f'<div class="figures">{shown}</div>', text, notes(tables.notes(part)))


def cost_figure(part: Section, sizes: Sizes) -> go.Figure:
    """Published figures are hollow, measured ones filled; the budgets of one series are joined by a line. Menus choose
    the score and the cost."""
    costs = [key for key in AXES if any(_cost(row, key, sizes) for row in part.rows)]
    figure = go.Figure()
    xs: dict[str, list[Any]] = {key: [] for key in costs}
    ys: dict[str, list[Any]] = {key: [] for key in part.scores}
    errors: dict[str, list[Any]] = {key: [] for key in part.scores}
    for number, series in enumerate(dict.fromkeys(row.series for row in part.rows)):
        for measured in (False, True):
            points = _points([row for row in part.rows if row.series == series], measured)
            if not points or not costs:
                continue
            for key in costs:
                xs[key].append([row and _cost(row, key, sizes) for row in points])
            for key in part.scores:
                scores = [row and row.score(key) if measured else None for row in points]
                published = [row and row.figure(key) for row in points]
                ys[key].append([score and score[0] for score in scores] if measured else published)
                errors[key].append([score and score[1] for score in scores])
            color, symbol = COLORS[number % len(COLORS)], SYMBOLS[number % len(SYMBOLS)]
            figure.add_scatter(
                x=xs[costs[0]][-1],
                y=ys[part.scores[0]][-1],
                error_y={"array": errors[part.scores[0]][-1], "thickness": 1.5},
                name=plain(series) + ("" if measured else ", published"),
                mode="lines+markers+text",
                cliponaxis=False,
                text=[row and plain(row.n if row.has_budget else row.dynamic) for row in points],
                textposition="top center",
                hovertext=[row and _describe(row) for row in points],
                hoverinfo="text",
                line={"color": color, "width": 1, "dash": "solid" if measured else "dot"},
                marker={
                    "size": 10,
                    "symbol": symbol if measured else f"{symbol}-open",
                    "opacity": [0.5 if row and measured and row.state == UNFINISHED else 1 for row in points],
                },
            )
    menus = []
    for axis, keys, labels, values in (("x", costs, AXES, xs), ("y", part.scores, LABELS, ys)):
        changes = [{axis: values[key]} | ({"error_y.array": errors[key]} if axis == "y" else {}) for key in keys]
        buttons = [
            {"label": f"{axis}: {label}", "method": "update", "args": [change, {f"{axis}axis.title.text": label}]}
            for label, change in zip((labels[key] for key in keys), changes, strict=True)
        ]
        menus += [menu(buttons, len(menus))] if len(keys) > 1 else []
    figure.update_xaxes(type="log", tickformat="~s", dtick="D2", title_text=AXES[costs[0]] if costs else "")
    figure.update_yaxes(title_text=f"{LABELS[part.scores[0]]} (%)")
    room = 40 * len(menus)
    return figure.update_layout(updatemenus=menus, margin_t=20 + room, height=400 + room, legend=LEGEND)


def _cost(row: Row, key: str, sizes: Sizes) -> float | None:
    """Detectors are laid out by the parameters of their backbone, which ImageNet's rows tell."""
    if key == "backbone_params":
        return sizes.get((row.backbone, row.n)) if row.task != CLASSIFICATION else None
    value: float | None = getattr(row, key)
    return value


def _points(rows: list[Row], measured: bool) -> list[Row | None]:
    """Static models, then, after a gap in the line, budgets in their order; a published row once."""
    if measured:
        shown = [row for row in rows if row.runs]
    else:
        figures = (row for row in rows if row.published and any(row.published.scores.values()))
        shown = list({row.name: row for row in figures}.values())
    static = [row for row in shown if row.n == STATIC]
    budgets = sorted((row for row in shown if row.n != STATIC), key=lambda row: _order(row.n))
    gap = [None] if static and budgets else []
    return [*static, *gap, *budgets]


def _order(n: str) -> float:
    try:
        return float(parse_budget(n))
    except ValueError:
        return 0.0


def _describe(row: Row) -> str:
    """What the pointer shows of a row."""
    lines = [f"<b>{plain(row.name)}</b>"]
    for key, label in LABELS.items():
        figure = row.figure(key) if row.published and key in row.published.scores else None
        parts = [tables.spread(row.score(key))] if row.score(key) else []
        parts += [f"published {figure:.2f}"] if figure is not None else []
        lines += [f"{label}: {', '.join(parts)}"] if parts else []
    counts = (("parameters", row.params), ("multiply-adds", row.macs))
    lines += [f"{name}: {value:,}" for name, value in counts if value]
    done, asked = row.epochs
    lines.append(f"{row.state}, {done} of {asked} epochs, seeds: {row.seeds}")
    lines += [plain(text) for text in row.departures]
    return "<br>".join(lines)


def curves_figure(part: Section) -> go.Figure:
    """The mean over seeds, with a band from the least to the greatest."""
    figure = go.Figure()
    for number, row in enumerate(row for row in part.rows if curve(row)):
        epochs, means, least, most = zip(*curve(row), strict=True)
        color, group = COLORS[number % len(COLORS)], str(number)
        figure.add_scatter(
            x=epochs, y=means, name=plain(row.name), legendgroup=group, line={"color": color},
            mode="lines" if len(epochs) > 1 else "markers",
        )  # fmt: skip
        if row.seeds > 1:
            figure.add_scatter(
                x=[*epochs, *reversed(epochs)], y=[*most, *reversed(least)], fill="toself", opacity=0.2,
                fillcolor=color, line={"width": 0}, legendgroup=group, showlegend=False, hoverinfo="skip", mode="lines",
            )  # fmt: skip
    figure.update_xaxes(title_text="epoch")
    figure.update_yaxes(title_text=f"{LABELS[part.scores[0]]} (%)")
    return figure.update_layout(hovermode="x unified", legend=LEGEND)


def curve(row: Row) -> list[tuple[int, float, float, float]]:
    """(epoch, mean over seeds, least, most), for the epochs that all seeds have."""
    by_epoch = [dict(run.curve) for run in row.runs]
    epochs = sorted(set.intersection(*map(set, by_epoch))) if by_epoch else []
    values = {epoch: [scores[epoch] for scores in by_epoch] for epoch in epochs}
    return [(epoch, round(mean(at), 4), min(at), max(at)) for epoch, at in values.items()]
