"""The figure of docs/cifar10.md: accuracy over epochs and over time of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from scripts.cifar10.cases import CASES, Case
from scripts.cifar10.table import TITLES, complete, runs_of
from scripts.page import COLORS


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row of axes for each protocol that has runs, at least one. Finished runs only, where there are any.

    Over epochs: the mean of the seeds, and a band from the least to the greatest. Over hours of training: each seed's
    own line, for loads differ, and only of the device that most epochs were trained on.
    """
    lines = complete(lines) or lines
    device = Counter(line["device"] for line in lines).most_common(1)[0][0] or "the machine at hand"
    timed = [line for line in lines if line["device"] in (device, "")]
    run = {line["protocol"] for line in lines}
    titles = {protocol: title for protocol, title in TITLES.items() if protocol in run}
    names = list(dict.fromkeys(case.name for case in CASES))
    figure, axes = plt.subplots(len(titles), 2, figsize=(11, 4.2 * len(titles)), squeeze=False, layout="constrained")
    for (over_epochs, over_time), (protocol, title) in zip(axes, titles.items(), strict=True):
        for case in (case for case in CASES if case.protocol == protocol):
            _add(over_epochs, lines, over_time, timed, case, COLORS[names.index(case.name)])
        over_epochs.set(title=title, xlabel="epoch", ylabel="test top-1 (%)")
        over_time.set(xlabel=f"hours of training on {device}, without evaluation")
        for axis in (over_epochs, over_time):
            axis.set_ylim(bottom=50)
            axis.grid(alpha=0.3)
        over_epochs.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _add(
    over_epochs: Axes, lines: Sequence[Mapping[str, Any]], over_time: Axes, timed: Sequence[Mapping[str, Any]],
    case: Case, color: str,
) -> None:  # fmt: skip
    runs = list(runs_of(lines, case).values())
    if not runs:
        return
    epochs = range(min(map(len, runs)))
    values = [[float(run[at]["top1"]) for run in runs] for at in epochs]
    numbers = [at + 1 for at in epochs]
    label = f"{case.name} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
    over_epochs.plot(numbers, [mean(at) for at in values], color=color, label=label)
    over_epochs.fill_between(numbers, [min(at) for at in values], [max(at) for at in values], color=color, alpha=0.2)
    for run in runs_of(timed, case).values():
        hours = [float(line["seconds"]) / 3600 for line in run]
        over_time.plot(hours, [float(line["top1"]) for line in run], color=color, linewidth=1)
