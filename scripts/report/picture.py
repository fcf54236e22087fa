"""Accuracy against parameters, and learning curves, as one picture for a README or a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from kw.config import KW, STATIC
from scripts.report.page import curve
from scripts.report.published import LABELS
from scripts.report.rows import Section


def draw(made: list[Section], path: Path) -> None:
    """A line of two plots for each table that has runs."""
    shown = [section for section in made if not section.empty]
    figure, axes = plt.subplots(len(shown), 2, figsize=(11, 4.2 * len(shown)), layout="constrained", squeeze=False)
    for section, (cost, curves) in zip(shown, axes, strict=True):
        _draw_section(section, cost, curves)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_section(section: Section, cost: Any, curves: Any) -> None:
    """The mean over seeds; their deviation as a bar, their range as a band."""
    key = section.scores[0]
    shown = [(row, score) for row in section.rows if row.runs and (score := row.score(key)) is not None]
    for number, (row, score) in enumerate(shown):
        color = f"C{number}"  # of matplotlib's cycle, the same in both plots
        if row.params:
            place = (row.params / 1e6, score[0])
            cost.errorbar(*place, score[1] or 0, marker="o", capsize=3, linestyle="none", color=color)
            method = "" if row.dynamic in (KW, STATIC) else f"{row.dynamic}, "
            text = row.n if row.n == STATIC else f"{method}n = {row.n}"  # the colors say of which backbone
            cost.annotate(text, place, (0, 7), textcoords="offset points", ha="center", fontsize=8)
        line = curve(row)
        if line:
            epochs, means, least, most = zip(*line, strict=True)
            curves.plot(epochs, means, label=row.name, color=color)
            curves.fill_between(epochs, least, most, alpha=0.2, color=color)
    label = f"{LABELS[key]} (%)"
    title = f"{section.title}: accuracy against parameters"
    cost.set(xlabel="parameters (millions)", ylabel=label, title=title, xscale="log")
    cost.margins(x=0.3, y=0.15)
    cost.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    cost.xaxis.set_major_formatter("{x:g}")
    cost.xaxis.set_minor_formatter(NullFormatter())
    curves.set(xlabel="epoch", ylabel=label, title="Learning curves")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curves.lines:
        curves.legend(fontsize=8)
    for axes in (cost, curves):
        axes.grid(alpha=0.3)
