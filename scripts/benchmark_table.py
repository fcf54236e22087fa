"""The benchmark's figures as text, Markdown, CSV and a picture: time and memory by way, beside the static ones."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from textwrap import fill

import matplotlib
from rich.console import Console
from rich.table import Table

from kw.backbones import STATIC

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

PLAIN = "grouped"
TITLES = {PLAIN: "plain", "auto": "chosen"}
# What is measured: its name, the unit it is shown in, and how many of that make a second or a byte.
MEASURED = {
    "train": ("training step", "ms", 1e3),
    "eval": ("evaluation", "ms", 1e3),
    "one": ("batch of one", "ms", 1e3),
    "memory": ("peak memory", "MB", 1e-6),
}


@dataclass(frozen=True)
class Sample:
    """What the rounds gave, in seconds or bytes; or why there is nothing."""

    values: tuple[float, ...]
    error: str = ""

    def quartiles(self) -> tuple[float, float, float]:
        if len(self.values) == 1:
            return self.values * 3
        low, middle, high = quantiles(self.values, n=4, method="inclusive")
        return low, middle, high

    def cell(self, scale: float) -> str:
        """The median, and the quartiles where there are several values."""
        if not self.values:
            return "failed"
        low, middle, high = (_digits(scale * value) for value in self.quartiles())
        return f"{middle} ({low}–{high})" if len(self.values) > 1 else middle


@dataclass(frozen=True)
class Row:
    """One case and one thing measured of it, by way, the static backbone among them."""

    backbone: str
    n: str
    batch: int
    size: int
    what: str
    samples: dict[str, Sample]

    def over_static(self, way: str) -> float | None:
        """How many times the static backbone's median, if there are both."""
        way_values, static_values = self.samples[way].values, self.samples[STATIC].values
        return median(way_values) / median(static_values) if way_values and static_values else None

    def excess(self, way: str) -> float | None:
        """What the way takes over the static backbone, in percent of what the plain way takes over it."""
        ratio = self.over_static(way)
        plain = self.over_static(PLAIN) if PLAIN in self.samples else None
        # A plain way as fast as the static backbone leaves nothing to be a part of.
        return 100 * (ratio - 1) / (plain - 1) if ratio is not None and plain is not None and plain > 1 else None

    def cells(self) -> list[str]:
        """As `head` names them."""
        name, unit, scale = MEASURED[self.what]
        ways = [way for way in self.samples if way != STATIC]
        cells = [f"{self.backbone} n={self.n}", str(self.batch), str(self.size), f"{name}, {unit}"]
        cells.append(self.samples[STATIC].cell(scale))
        for way in ways:
            cells += [self.samples[way].cell(scale), _number(self.over_static(way), ".2f", "x")]
        return cells + [_number(self.excess(way), ".0f", "%") for way in ways if way != PLAIN]


def head(rows: list[Row]) -> list[str]:
    ways = [way for way in rows[0].samples if way != STATIC]
    names = ["model", "batch", "pixels", "measured", STATIC]
    for way in ways:
        names += [title(way), "/ static"]
    return names + [f"{TITLES.get(way, way)} / plain excess" for way in ways if way != PLAIN]


def title(way: str) -> str:
    return f"{TITLES[way]} ({way})" if way in TITLES else way


def header(setup: dict[str, str]) -> str:
    """The line that names the machine."""
    return (
        f"{setup['machine']}, threads: {setup['threads']}, {setup['dtype']}, {setup['layout']}, "
        f"environment: {setup['environment']}, PyTorch {setup['torch']}, commit {setup['commit']}"
    )


def failures(rows: list[Row]) -> list[str]:
    return [
        f"{row.backbone} n={row.n}, {MEASURED[row.what][0]}, {title(way)}: {sample.error}"
        for row in rows
        for way, sample in row.samples.items()
        if sample.error
    ]


def show(rows: list[Row], setup: dict[str, str], console: Console) -> None:
    table = Table(*head(rows))
    for place, column in enumerate(table.columns):
        column.overflow, column.justify = "fold", "left" if place < 4 else "right"
    for above, row in zip([None, *rows], rows, strict=False):
        if above is not None and (above.backbone, above.n) != (row.backbone, row.n):
            table.add_section()
        table.add_row(*row.cells())
    console.print(header(setup), markup=False)
    console.print(table)
    for line in failures(rows):
        console.print(line, markup=False)


def markdown(rows: list[Row], setup: dict[str, str]) -> str:
    names = head(rows)
    lines = [names, ["---"] * 4 + ["---:"] * (len(names) - 4), *(row.cells() for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    note = "Medians with quartiles; excess is what a way takes over the static backbone."
    return f"{header(setup)}\n\n{table}\n{note}\n" + "".join(f"\n- {line}" for line in failures(rows))


def write_csv(rows: list[Row], setup: dict[str, str], path: Path) -> None:
    """One line for each way of each row, every number in full, in seconds and bytes."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        figures = ("rounds", "median", "min", "q1", "q3", "max", "over_static", "excess_percent_of_plain", "error")
        writer.writerow(["backbone", "n", "batch", "size", "measured", "way", *figures, *setup])
        for row in rows:
            for way, sample in row.samples.items():
                numbers: tuple[float | str, ...] = ("",) * 5
                if sample.values:
                    low, middle, high = sample.quartiles()
                    numbers = (middle, min(sample.values), low, high, max(sample.values))
                compared = (row.over_static(way), row.excess(way))
                case = (row.backbone, row.n, row.batch, row.size, row.what, way, len(sample.values))
                writer.writerow([*case, *numbers, *compared, sample.error, *setup.values()])


def draw(rows: list[Row], setup: dict[str, str], path: Path) -> None:
    """A panel for each thing measured: how many times the static backbone's, by case and way."""
    panels = [what for what in MEASURED if any(row.what == what for row in rows)]
    cases = list(dict.fromkeys((row.backbone, row.n) for row in rows))
    size = (3 + 1.5 * len(cases), 0.9 + 2.6 * len(panels))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False)
    for what, panel in zip(panels, axes[:, 0], strict=True):
        _bars(panel, [row for row in rows if row.what == what])
        panel.set_title(MEASURED[what][0], fontsize=10)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"Times the static backbone's (logarithmic)\n{fill(header(setup), 30 + 24 * len(cases))}", fontsize=8
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(panel: Axes, rows: list[Row]) -> None:
    """Bars that start at 1, the static backbone, and so point down where a way is cheaper than that."""
    ways = [way for way in rows[0].samples if way != STATIC]
    width = 0.8 / len(ways)
    for k, way in enumerate(ways):
        ratios = [row.over_static(way) for row in rows]
        places = [x + (k - (len(ways) - 1) / 2) * width for x in range(len(rows))]
        heights = [0 if ratio is None else ratio - 1 for ratio in ratios]
        bars = panel.bar(places, heights, width, bottom=1, label=title(way))
        texts = ["failed" if ratio is None else f"{ratio:.3g}" for ratio in ratios]
        panel.bar_label(bars, texts, fontsize=8, padding=2)
    panel.set_xticks(range(len(rows)), [f"{row.backbone}\nn = {row.n}, batch {row.batch}" for row in rows], fontsize=8)
    panel.set_yscale("log")
    panel.axhline(1, color="black", linewidth=0.8)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.margins(y=0.2)
    panel.grid(axis="y", alpha=0.3)


def _digits(value: float) -> str:
    """Three digits that count, at least: 6,824, 152, 15.2, 1.52."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _number(value: float | None, form: str, unit: str) -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
