"""One self-contained HTML page of plotly figures and sortable tables.

plotly.js is written into the page once: 4.8 MB buy a single file that can be mailed and opens offline. The page's
content security policy forbids it to load anything. The camera button of each figure saves it as SVG.
"""

from __future__ import annotations

import html
from pathlib import Path

from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

ASSETS = Path(__file__).parent / "assets"
COLORS = ("#2a6fdb", "#ee8a1d", "#12a594", "#c2417c", "#8b5cf6", "#7ba31c", "#b3412e", "#5d9cec", "#98823a", "#8a94a3")
GRID = {"gridcolor": "rgba(128, 128, 128, 0.2)", "zeroline": False, "automargin": True}
CLEAR = "rgba(0, 0, 0, 0)"
LOOK = go.layout.Template(
    layout={
        "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "colorway": COLORS, "xaxis": GRID, "yaxis": GRID,
        "font": {"family": "system-ui, sans-serif", "size": 12}, "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "hoverlabel": {"bgcolor": "#222b3a", "font": {"color": "#ffffff"}, "align": "left"},
        "modebar": {"bgcolor": CLEAR}, "height": 420,
    }
)  # fmt: skip
CONFIG = {"displaylogo": False, "responsive": True, "toImageButtonOptions": {"format": "svg"}}

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<header>
<div><h1>{title}</h1><p>{subtitle}</p></div>
<button id="theme" type="button" title="Light or dark" aria-label="Light or dark">&#9680;</button>
</header>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def page(title: str, subtitle: str, body: str) -> str:
    """The page's text; `body` is HTML, made by the functions below."""
    return TEMPLATE.format(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        body=body,
        script=(ASSETS / "page.js").read_text(encoding="utf-8"),
    )


def plain(text: str) -> str:
    """A name as text of a figure, which plotly reads as HTML."""
    return html.escape(text, quote=False)


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def figure_html(figure: go.Figure, title: str = "") -> str:
    """A figure as a part of the page."""
    text: str = figure.update_layout(template=LOOK).to_html(CONFIG, full_html=False, include_plotlyjs=False)
    return f"<div>{f'<h3>{html.escape(title)}</h3>' if title else ''}{text}</div>"


def menu(buttons: list[dict[str, object]], above: int = 0) -> dict[str, object]:
    """A drop-down list above a figure, and above as many others as `above` says: side by side they would overlap on a
    narrow screen."""
    place = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "pad": {"b": 40 * above}}
    return {"buttons": buttons, "showactive": True, **place}


def table(names: list[str], rows: list[list[str]], left: int, classes: list[str] | None = None) -> str:
    """A table that a click on its head sorts; the first `left` columns are words, the others numbers."""
    aligned = ["" if place < left else ' class="number"' for place in range(len(names))]
    top = "".join(f"<th{how} tabindex=0>{html.escape(name)}</th>" for how, name in zip(aligned, names, strict=True))
    body = []
    for row, kind in zip(rows, classes or [""] * len(rows), strict=True):
        line = "".join(f"<td{how}>{html.escape(cell)}</td>" for how, cell in zip(aligned, row, strict=True))
        body.append(f'<tr class="{kind}">{line}</tr>')
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def notes(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""
