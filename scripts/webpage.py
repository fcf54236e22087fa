"""One self-contained HTML page: style, scripts and data are in it, and its policy forbids it to load anything.

The plots are drawn by a few functions of our own as SVG (assets/*.js): a library for them would put megabytes into
every report, to draw points and lines.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<div><h1>{title}</h1><p>{subtitle}</p></div>
<button id="theme" type="button" title="Light or dark" aria-label="Light or dark">&#9680;</button>
</header>
<main>
{body}
</main>
<div id="tip" role="status"></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def page(title: str, subtitle: str, body: str, data: Any, script: str) -> str:
    """The page's text; `body` is HTML, `script` the name of a file in assets/ that draws what `data` holds."""
    # "<" could end the script element early, whatever the names in the data are.
    plain = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.format(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        body=body,
        data=plain,
        script="".join((ASSETS / name).read_text(encoding="utf-8") for name in ("page.js", script)),
    )


def table(names: list[str], rows: list[list[str]], left: int, classes: list[str] | None = None) -> str:
    """A table that can be sorted by a click on its head; the first `left` columns are words."""
    aligned = ["" if place < left else ' class="number"' for place in range(len(names))]
    top = "".join(f"<th{how} tabindex=0>{html.escape(name)}</th>" for how, name in zip(aligned, names, strict=True))
    body = []
    for row, kind in zip(rows, classes or [""] * len(rows), strict=True):
        line = "".join(f"<td{how}>{html.escape(cell)}</td>" for how, cell in zip(aligned, row, strict=True))
        body.append(f'<tr class="{kind}">{line}</tr>')
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
