"""The report as one page: assets/report.js draws what is collected here."""

from __future__ import annotations

import html
from statistics import mean
from typing import Any

from kw.config import KW, STATIC
from scripts.report.published import CLASSIFICATION, LABELS
from scripts.report.rows import NOT_RUN, Row, Section
from scripts.report.tables import cells, head, left, notes
from scripts.webpage import page, table

BODY = """
<nav id="tabs" role="tablist"></nav>
<div class="legend" id="legend"></div>
<div class="cards">
<section class="card"><div class="bar"><h2>Accuracy against cost</h2>
<label>y <select id="y"></select> x <select id="x"></select></label></div><div id="cost"></div></section>
<section class="card"><div class="bar"><h2>Learning curves</h2>
<label>show <select id="part"><option value="0">all</option><option value="0.3">the upper part</option>
</select></label></div><div id="curves"></div></section>
</div>
"""


def report_page(made: list[Section], remarks: list[str]) -> str:
    """The page's text: a tab for each table, and for each data set of the other runs."""
    tabs = [tab for section in made for tab in _split(section)]
    sizes = {(row.backbone, row.n): row.params for row in _rows(made) if _sizes_detectors(row)}
    known = [row for row in _rows(made) if row.published]
    run = len({row.published.id for row in known if row.runs and row.published})
    total = len({row.published.id for row in known if row.published})
    count = sum(row.seeds for row in _rows(made))
    subtitle = f"{count} run{'s' if count != 1 else ''}; {run} of the paper's {total} rows run"
    body = BODY + "".join(_table(number, tab) for number, tab in enumerate(tabs))
    if remarks:
        told = "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks)
        body += f'<section class="card"><h2>Passed over or unfinished</h2><ul>{told}</ul></section>'
    data = {"labels": LABELS, "tabs": [_tab(tab, sizes) for tab in tabs]}
    return page("KernelWarehouse: measured beside published", subtitle, body, data, "report.js")


def _sizes_detectors(row: Row) -> bool:
    return row.task == CLASSIFICATION and row.dynamic in (KW, STATIC)


def _rows(made: list[Section]) -> list[Row]:
    return [row for section in made for row in section.rows]


def _split(section: Section) -> list[Section]:
    if section.published:
        return [section]
    names = sorted({row.data for row in section.rows})
    return [
        Section(
            section.title if name == "-" else name, section.task, [r for r in section.rows if r.data == name], False
        )
        for name in names
    ]


def _table(number: int, section: Section) -> str:
    classes = ["missing" if row.state == NOT_RUN else "" for row in section.rows]
    rows = [cells(row, section) for row in section.rows]
    told = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes(section))
    made = table(head(section), rows, left(section), classes)
    return f'<section class="card" data-tab="{number}"><h2>{html.escape(section.title)}</h2>{made}{told}</section>'


def _tab(section: Section, sizes: dict[tuple[str, str], int | None]) -> dict[str, Any]:
    """`sizes`: the parameters of ImageNet's rows, which detectors are laid out by: those of their backbones."""
    rows = []
    for row in section.rows:
        detector = sizes.get((row.backbone, row.n)) if row.task != CLASSIFICATION else None
        plain = {key: getattr(row, key) for key in ("name", "n", "params", "macs", "images_per_second", "hours",
                                                    "seeds", "state", "epochs", "departures")}  # fmt: skip
        scores = {key: row.score(key) for key in section.scores}
        figures = {key: row.figure(key) for key in section.scores}
        made = {"backbone": row.series, "scores": scores, "figures": figures, "curve": curve(row)}
        rows.append({**plain, **made, "backbone_params": detector})
    return {"title": section.title, "scores": section.scores, "published": section.published, "rows": rows}


def curve(row: Row) -> list[tuple[int, float, float, float]]:
    """(epoch, mean over seeds, least, most), for the epochs that all seeds have."""
    by_epoch = [dict(run.curve) for run in row.runs]
    epochs = sorted(set.intersection(*map(set, by_epoch))) if by_epoch else []
    values = {epoch: [scores[epoch] for scores in by_epoch] for epoch in epochs}
    return [(epoch, round(mean(at), 4), min(at), max(at)) for epoch, at in values.items()]
