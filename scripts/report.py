"""A table of run folders: measured beside each other, spread over seeds; as text, Markdown, CSV and a picture.

    python -m scripts.report runs/digits                 every run below a folder
    python -m scripts.report runs/a runs/b --out report

Runs of one name on one data set that differ in their seed make one row. Folders that hold no finished run are named.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import yaml
from rich.console import Console
from rich.table import Table

from kw.backbones import STATIC

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

HEAD = ("run", "backbone", "data", "n", "parameters", "multiply-adds", "top-1", "top-5", "images/s", "epochs", "seeds")
PUBLISHED = Path(__file__).with_name("published.yaml")
SAME = ("data", "name", "n", "params", "macs", "epochs")  # what the runs of a row have in common


@dataclass(frozen=True)
class Run:
    """One finished run: its folder, `summary.json` and the lines of `metrics.jsonl`."""

    folder: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone."""

    runs: list[Run]

    def __getitem__(self, key: str) -> Any:
        return self.runs[0].summary[key]

    def values(self, key: str) -> list[float]:
        return [run.summary[key] for run in self.runs]

    def cells(self) -> tuple[str, ...]:
        """As `HEAD` names them; mean and sample standard deviation where there are several seeds."""
        return (
            self["name"],
            self["backbone"],
            self["data"],
            str(self["n"]),
            f"{self['params']:,}",
            f"{self['macs']:,}",
            _spread(self.values("top1")),
            _spread(self.values("top5")),
            f"{mean(self.values('images_per_second')):,.0f}",
            str(self["epochs"]),
            str(len(self.runs)),
        )


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Finished runs at or below the folders, and a remark for each one that is unfinished or broken."""
    runs, remarks = [], []
    for folder in sorted({path.parent for root in folders for path in root.rglob("config.yaml")}):
        try:
            summary = json.loads((folder / "summary.json").read_text())
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            run = Run(folder, summary, metrics)
            Row([run]).cells()  # whatever is missing, is missed here
        except FileNotFoundError as error:
            remarks.append(f"{folder}: not finished ({Path(error.filename).name} is not there yet)")
        except (OSError, ValueError, KeyError, TypeError) as error:
            remarks.append(f"{folder}: broken ({type(error).__name__}: {error})")
        else:
            runs.append(run)
    return runs, remarks


def group(runs: list[Run]) -> tuple[list[Row], list[str]]:
    """One row for runs of one name, data set, budget and cost, cheapest first; and a remark for each run whose seed its
    row has already: a copy of a run, or the same run in two places, tells nothing of the spread."""
    rows: dict[tuple[Any, ...], dict[int, Run]] = {}
    remarks = []
    for run in runs:
        seeds = rows.setdefault(tuple(run.summary[key] for key in SAME), {})
        seed = run.summary["seed"]
        if seed in seeds:
            remarks.append(f"{run.folder}: left out, {seeds[seed].folder} is of the same settings and seed")
        else:
            seeds[seed] = run
    found = [Row(list(seeds.values())) for seeds in rows.values()]
    return sorted(found, key=lambda row: (row["data"], row["params"])), remarks


def published() -> dict[tuple[str, str], str]:
    """The published top-1 on ImageNet by backbone and n."""
    found = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))["imagenet"]
    labels = {row["backbone"]: row["id"] for row in found if row["n"] is None}  # what runs call their backbones
    return {(labels[row["backbone"]], row["n"] or STATIC): f"{row['top1']:.2f}" for row in found if row["top1"]}


def lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """The head and the cells of all rows; where there are runs on ImageNet, with what was published beside top-1."""
    plain = [HEAD, *(row.cells() for row in rows)]
    if all(row["data"] != "imagenet" for row in rows):
        return plain
    table = published()
    found = [table.get((row["backbone"], str(row["n"])), "-") if row["data"] == "imagenet" else "-" for row in rows]
    place = HEAD.index("top-1") + 1
    return [(*line[:place], cell, *line[place:]) for line, cell in zip(plain, ["published", *found], strict=True)]


def show(rows: list[Row], console: Console) -> None:
    head, *cells = lines(rows)
    table = Table(*head)
    table.columns[0].overflow = "fold"
    for column in table.columns[4:]:
        column.justify = "right"
    for line in cells:
        table.add_row(*line)
    console.print(table)


def markdown(rows: list[Row]) -> str:
    head, *cells = lines(rows)
    rule = ("---",) * 4 + ("---:",) * (len(head) - 4)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *cells))


def write_csv(rows: list[Row], path: Path) -> None:
    """One line a run, every number in full."""
    keys = ("name", "data", "backbone", "n", "seed", "params", "macs", "top1", "top5", "images_per_second", "epochs")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "folder"])
        for row in rows:
            writer.writerows([*(run.summary.get(key) for key in keys), run.folder] for run in row.runs)


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy against parameters, and accuracy by epoch (the mean over seeds, their range shaded)."""
    figure, (cost, curves) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for row in rows:
        top1 = row.values("top1")
        dots = cost.errorbar(row["params"] / 1e6, mean(top1), _deviation(top1), marker="o", capsize=3, linestyle="none")
        text = row["n"] if row["n"] == STATIC else f"n = {row['n']}"  # the colors say of which backbone
        cost.annotate(
            text, (row["params"] / 1e6, mean(top1)), (0, 7), textcoords="offset points", ha="center", fontsize=8
        )
        by_epoch = list(zip(*([line["top1"] for line in run.metrics] for run in row.runs), strict=False))
        epochs = range(1, len(by_epoch) + 1)
        color = dots.lines[0].get_color()
        curves.plot(epochs, [mean(at) for at in by_epoch], label=row["name"], color=color)
        curves.fill_between(epochs, [min(at) for at in by_epoch], [max(at) for at in by_epoch], alpha=0.2, color=color)
    cost.set(xlabel="parameters (millions)", ylabel="top-1 (%)", title="Accuracy against parameters", xscale="log")
    cost.margins(x=0.3, y=0.15)
    cost.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    cost.xaxis.set_major_formatter("{x:g}")
    cost.xaxis.set_minor_formatter(NullFormatter())
    curves.set(xlabel="epoch", ylabel="top-1 (%)", title="Learning curves")
    curves.legend(fontsize=8)
    for axes in (cost, curves):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders above them")
    parser.add_argument("--out", type=Path, default=Path("report"), help="where the files go (default: report)")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    missing = [str(folder) for folder in options.folders if not folder.is_dir()]
    if missing:
        sys.exit(f"No such folder: {', '.join(missing)}")
    runs, remarks = find_runs(options.folders)
    rows, repeated = group(runs)
    for remark in remarks + repeated:
        console.print(remark, markup=False)
    if not runs:
        sys.exit(f"No finished run below {', '.join(map(str, options.folders))}: a run ends with a summary.json.")
    show(rows, console)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(markdown(rows))
    write_csv(rows, options.out / "runs.csv")
    draw(rows, options.out / "picture.png")
    console.print(f"Written to {options.out}: table.md, runs.csv, picture.png")


if __name__ == "__main__":
    main()
