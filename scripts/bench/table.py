"""The benchmark's results as text, Markdown, CSV and a picture: time and memory of each choice and the static model."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import matplotlib
from rich.console import Console
from rich.table import Table

from kw.config import STATIC
from scripts.bench.timing import Sample

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

PLAIN = "grouped"
TITLES = {PLAIN: "plain", "auto": "chosen"}
# What is measured: its name, the unit it is shown in, and how many of the unit make a second or a byte.
MEASURED = {
    "train": ("training step", "ms", 1e3),
    "eval": ("evaluation", "ms", 1e3),
    "one": ("batch of one", "ms", 1e3),
    "memory": ("peak memory", "MB", 1e-6),
}


@dataclass(frozen=True)
class Row:
    """One case and one thing measured of it, by choice, the static backbone among them."""

    backbone: str
    n: str
    batch: int
    size: int
    what: str
    samples: dict[str, Sample]

    def over_static(self, choice: str) -> float | None:
        """The ratio to the static backbone's median, if there are both."""
        ours, static = self.samples.get(choice), self.samples[STATIC]
        return ours.median / static.median if ours is not None and ours.values and static.values else None

    def excess(self, choice: str) -> float | None:
        """The choice's excess over the static backbone, in percent of the plain choice's excess."""
        ratio, plain = self.over_static(choice), self.over_static(PLAIN)
        # There is no such percentage if the plain choice is as fast as the static backbone.
        return 100 * (ratio - 1) / (plain - 1) if ratio is not None and plain is not None and plain > 1 else None

    def cells(self, choices: list[str]) -> list[str]:
        """The row under `head`'s names."""
        name, unit, scale = MEASURED[self.what]
        cells = [f"{self.backbone} n={self.n}", str(self.batch), str(self.size), f"{name}, {unit}"]
        cells.append(_sample(self.samples[STATIC], scale))
        for choice in choices:
            cells += [_sample(self.samples.get(choice), scale), _number(self.over_static(choice), ".2f", "x")]
        return cells + [_number(self.excess(choice), ".0f", "%") for choice in choices if choice != PLAIN]


def choices_of(rows: list[Row]) -> list[str]:
    """The choices of all rows: not every choice is in every row."""
    return list(dict.fromkeys(choice for row in rows for choice in row.samples if choice != STATIC))


def head(choices: list[str]) -> list[str]:
    names = ["model", "batch", "pixels", "measured", STATIC]
    for choice in choices:
        names += [title(choice), "/ static"]
    return names + [f"{TITLES.get(choice, choice)} / plain excess" for choice in choices if choice != PLAIN]


def title(choice: str) -> str:
    return f"{TITLES[choice]} ({choice})" if choice in TITLES else choice


def header(setup: dict[str, str]) -> str:
    """One line about the machine."""
    return (
        f"{setup['machine']}, threads: {setup['threads']}, {setup['dtype']}, {setup['layout']}, "
        f"environment: {setup['environment']}, PyTorch {setup['torch']}, commit {setup['commit']}"
    )


def failures(rows: list[Row]) -> list[str]:
    return [
        f"{row.backbone} n={row.n}, {MEASURED[row.what][0]}, {title(choice)}: {sample.error}"
        for row in rows
        for choice, sample in row.samples.items()
        if sample.error
    ]


def show(rows: list[Row], setup: dict[str, str], console: Console) -> None:
    choices = choices_of(rows)
    table = Table(*head(choices))
    for place, column in enumerate(table.columns):
        column.overflow, column.justify = "fold", "left" if place < 4 else "right"
    for above, row in zip([None, *rows], rows, strict=False):
        if above is not None and (above.backbone, above.n) != (row.backbone, row.n):
            table.add_section()
        table.add_row(*row.cells(choices))
    console.print(header(setup), markup=False)
    console.print(table)
    for line in failures(rows):
        console.print(line, markup=False)


def markdown(rows: list[Row], setup: dict[str, str]) -> str:
    choices = choices_of(rows)
    names = head(choices)
    lines = [names, ["---"] * 4 + ["---:"] * (len(names) - 4), *(row.cells(choices) for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    note = "Medians with quartiles; excess is what a choice takes over the static backbone."
    return f"{header(setup)}\n\n{table}\n{note}\n" + "".join(f"\n- {line}" for line in failures(rows))


def write_csv(rows: list[Row], setup: dict[str, str], path: Path) -> None:
    """One line for each choice of each row, every number in full, in seconds and bytes."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        figures = ("rounds", "median", "min", "q1", "q3", "max", "over_static", "excess_percent_of_plain", "error")
        writer.writerow(["backbone", "n", "batch", "size", "measured", "choice", *figures, *setup])
        for row in rows:
            for choice, sample in row.samples.items():
                numbers: tuple[float | str, ...] = ("",) * 5
                if sample.values:
                    low, middle, high = sample.quartiles()
                    numbers = (middle, min(sample.values), low, high, max(sample.values))
                compared = (row.over_static(choice), row.excess(choice))
                case = (row.backbone, row.n, row.batch, row.size, row.what, choice, len(sample.values))
                writer.writerow([*case, *numbers, *compared, sample.error, *setup.values()])


def draw(rows: list[Row], setup: dict[str, str], path: Path) -> None:
    """A panel for each quantity: the ratio to the static backbone, by case and choice."""
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
    """Bars start at 1, the static backbone, and so point down where a choice is cheaper."""
    choices = choices_of(rows)
    width = 0.8 / len(choices)
    for k, choice in enumerate(choices):
        ratios = [row.over_static(choice) for row in rows]
        places = [x + (k - (len(choices) - 1) / 2) * width for x in range(len(rows))]
        heights = [0 if ratio is None else ratio - 1 for ratio in ratios]
        bars = panel.bar(places, heights, width, bottom=1, label=title(choice))
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


def _sample(sample: Sample | None, scale: float) -> str:
    """The median, and the quartiles where there are several values."""
    if sample is None:
        return "–"
    if not sample.values:
        return "failed"
    low, middle, high = (_digits(scale * value) for value in sample.quartiles())
    return f"{middle} ({low}–{high})" if len(sample.values) > 1 else middle


def _digits(value: float) -> str:
    """At least three significant digits: 6,824, 152, 15.2, 1.52."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _number(value: float | None, form: str, unit: str) -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
