"""The table of docs/cifar10.md from the lines of docs/cifar10.csv; it says what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from scripts.cifar10.cases import AUGMENTED, CASES, ORDER, SEEDS, Case, is_finished

HEAD = ("network", "parameters", "multiply-adds", "training top-1", "test top-1", "by seed", "over static",
        "over static as large")  # fmt: skip
TITLES = {
    ORDER: "16 epochs, crops of at least 70% of the area",
    AUGMENTED: "24 epochs, crops of at least 50% of the area, label smoothing 0.1",
}


def runs_of(lines: Iterable[Mapping[str, Any]], case: Case) -> dict[int, list[Mapping[str, Any]]]:
    """The case's lines by seed, in the order of epochs."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        if (line["protocol"], line["network"]) == (case.protocol, case.name):
            found.setdefault(int(line["seed"]), []).append(line)
    return found


def finished(lines: Iterable[Mapping[str, Any]], case: Case, key: str = "top1") -> dict[int, float]:
    """The last epoch's figure of each run that is complete, by seed."""
    return {seed: float(run[-1][key]) for seed, run in sorted(runs_of(lines, case).items()) if is_finished(case, run)}


def text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Both tables in Markdown, with what is missing below."""
    parts = []
    for protocol, title in TITLES.items():
        cases = [case for case in CASES if case.protocol == protocol]
        rows = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1), *(_row(lines, case, cases) for case in cases)]
        parts.append(f"**{title}**\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows))
    lacking = missing(lines)
    parts.append(f"Missing: {'; '.join(lacking)}.\n" if lacking else "Nothing is missing.\n")
    devices, commits = (_counted(lines, key) for key in ("device", "commit"))
    parts.append(f"Runs by device: {devices}; by commit: {commits}.\n")
    return "\n".join(parts)


def complete(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of runs that are finished."""
    runs = [run for case in CASES for run in runs_of(lines, case).values() if is_finished(case, run)]
    return [line for run in runs for line in run]


def _counted(lines: Sequence[Mapping[str, Any]], key: str) -> str:
    """How many finished runs have each value of `key`."""
    ends = [runs_of(lines, case)[seed][-1] for case in CASES for seed in finished(lines, case)]
    return ", ".join(f"{value} ({count})" for value, count in Counter(end[key] or "unknown" for end in ends).items())


def missing(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not run to its end."""
    found = []
    for case in CASES:
        runs = runs_of(lines, case)
        done = finished(lines, case)
        states = [
            f"seed {seed}" + (f" ({runs[seed][-1]['epoch']} of {case.epochs} epochs)" if seed in runs else "")
            for seed in SEEDS
            if seed not in done
        ]
        if states:
            found.append(f"{case.title}: {', '.join(states)}")
    return found


def _row(lines: Sequence[Mapping[str, Any]], case: Case, cases: list[Case]) -> list[str]:
    scores = finished(lines, case)
    if not scores:
        return [case.name, *["-"] * (len(HEAD) - 1)]
    run = runs_of(lines, case)[next(iter(scores))]
    static = finished(lines, cases[0])
    large = next((finished(lines, other) for other in cases if other.name == case.large), {})
    training = mean(finished(lines, case, "train_top1").values())
    by_seed = ", ".join(f"{score:.2f}" for score in scores.values())
    return [
        case.name,
        f"{int(run[-1]['params']):,}",
        f"{int(run[-1]['macs']) / 1e6:.1f} M",
        f"{training:.1f}",
        _spread(list(scores.values())),
        by_seed + (f" ({len(scores)} of {len(SEEDS)})" if len(scores) < len(SEEDS) else ""),
        "" if case is cases[0] else _over(scores, static),
        _over(scores, large) if case.large else "",
    ]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _over(scores: Mapping[int, float], base: Mapping[int, float]) -> str:
    return f"{mean(scores.values()) - mean(base.values()):+.2f}" if base else "-"
