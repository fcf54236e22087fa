"""Rows of the report: runs that differ only in their seed, joined with the published figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from kw.baselines import BASELINES
from kw.config import KW, STATIC
from scripts.report.published import CLASSIFICATION, DETECTION, SCORES, Published, Table, departures, published
from scripts.report.runs import Run
from scripts.report.steps import Step, cost

DONE, UNFINISHED, NOT_RUN, NO_CODE = "done", "unfinished", "not run", "published only"


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed, or none; the published row, if it is one of the paper; and the timed step
    that tells the cost of a row without runs. Each row has runs or was published."""

    runs: list[Run] = field(default_factory=list)
    published: Published | None = None
    step: Step | None = None

    @property
    def state(self) -> str:
        if not self.runs:
            return NOT_RUN if self.published and self.published.has_code else NO_CODE
        return DONE if self.runs[0].finished else UNFINISHED

    @property
    def _first(self) -> Run | Published:
        """What tells the row's name and settings."""
        found = self.runs[0] if self.runs else self.published
        assert found is not None, "a row has runs, or was published"
        return found

    @property
    def task(self) -> str:
        return self._first.task

    @property
    def name(self) -> str:
        return self._first.name

    @property
    def data(self) -> str:
        """The data set, and how many of its images were trained on, if not all."""
        if not self.runs:
            return self.task
        run = self.runs[0]
        return run.data if run.train_images is None else f"{run.data} ({run.train_images:,})"

    @property
    def backbone(self) -> str:
        return self.published.label if self.published else self._first.backbone

    @property
    def dynamic(self) -> str:
        """The method."""
        return self._first.dynamic

    @property
    def has_budget(self) -> bool:
        """Whether n means something for the method."""
        return self.dynamic in (KW, STATIC) or (self.dynamic in BASELINES and BASELINES[self.dynamic].budget)

    @property
    def series(self) -> str:
        """The line of a figure: a backbone with KernelWarehouse and the static one, or with another method."""
        return self.backbone if self.dynamic in (KW, STATIC) else f"{self.backbone} {self.dynamic}"

    @property
    def n(self) -> str:
        return self._first.n

    @property
    def params(self) -> int | None:
        return next((run.params for run in self.runs if run.params), self.published and self.published.params)

    @property
    def macs(self) -> int | None:
        return next((run.macs for run in self.runs if run.macs), self.published and self.published.macs)

    @property
    def seeds(self) -> int:
        return len(self.runs)

    @property
    def epochs(self) -> tuple[int, int]:
        """Finished, and asked for."""
        if not self.runs:
            return 0, self._first.epochs
        return self.runs[0].epochs, self.runs[0].asked or self.runs[0].epochs

    @property
    def images_per_second(self) -> float | None:
        found = [run.images_per_second for run in self.runs if run.images_per_second]
        return mean(found) if found else None

    @property
    def hours(self) -> float | None:
        """Device-hours of training: what the runs took on average, or what one would take."""
        if not self.runs:
            return cost(self.step, self.published) if self.step and self.published else None
        found = [run.hours for run in self.runs if run.hours is not None]
        return mean(found) if found else None

    @property
    def device(self) -> str | None:
        return self.runs[0].device if self.runs else self.step and self.step.device

    @property
    def departures(self) -> list[str]:
        """Settings of any of the runs that differ from the published row's."""
        if self.published is None:
            return []
        return sorted({text for run in self.runs for text in departures(run.config, self.published)})

    def score(self, key: str) -> tuple[float, float | None] | None:
        """Mean over seeds, and their sample standard deviation if there are several."""
        values = [run.scores[key] for run in self.runs if key in run.scores]
        return (mean(values), stdev(values) if len(values) > 1 else None) if values else None

    def figure(self, key: str) -> float | None:
        """The published score."""
        return self.published.scores[key] if self.published else None

    def difference(self, key: str) -> float | None:
        """Measured minus published, for finished runs."""
        measured, figure = self.score(key), self.figure(key)
        return measured[0] - figure if measured and figure is not None and self.state == DONE else None


@dataclass(frozen=True)
class Section:
    """The rows of one table."""

    title: str
    task: str
    rows: list[Row]
    table: Table | None  # the published one, if it is
    beside: list[Row] = field(default_factory=list)  # rows of another table, to compare with

    @property
    def published(self) -> bool:
        return self.table is not None

    @property
    def scores(self) -> tuple[str, ...]:
        return SCORES[self.task]

    @property
    def empty(self) -> bool:
        """Whether none of the rows has a run."""
        return not any(row.runs for row in self.rows)


OTHERS = {CLASSIFICATION: "Other runs", DETECTION: "Other detectors"}


def sections(runs: list[Run], steps: Iterable[Step] = ()) -> tuple[list[Section], list[str]]:
    """The paper's tables with all of their rows, then other runs; and a remark for each run that was left out."""
    groups, remarks = group(runs)
    timed = {step.row: step for step in steps}
    rows = {known: [Row([], known, timed.get(known.id))] for known in published()}
    others = []
    for members in groups:
        repeated = _published(members[0], rows)
        if not repeated:
            others.append(Row(members))
        for known in repeated:
            kept = [row for row in rows[known] if row.runs]
            rows[known] = [*kept, Row(members, known, timed.get(known.id))]
    made = []
    for table, task in dict.fromkeys((known.table, known.task) for known in rows):
        found = [row for known in rows if known.table == table for row in rows[known]]
        beside = [row for known in rows if known.id in table.beside and known.table != table for row in rows[known]]
        made.append(Section(table.title, task, found, table, beside))
    for task in SCORES:
        found = [row for row in others if row.task == task]
        if found:
            made.append(Section(OTHERS[task], task, sorted(found, key=_order), None))
    return made, remarks


def group(runs: list[Run]) -> tuple[list[list[Run]], list[str]]:
    """Runs of the same name, data set, budget, cost and length; and a remark for each run whose seed is already there:
    a copy of a run says nothing about the spread."""
    groups: dict[tuple[Any, ...], dict[int, Run]] = {}
    remarks = []
    for run in runs:
        of = (run.task, run.data, run.train_images, run.name, run.dynamic, run.n)
        key = (*of, run.params, run.macs, run.epochs, run.finished)
        seeds = groups.setdefault(key, {})
        if run.seed in seeds:
            remarks.append(f"{run.folder}: left out, {seeds[run.seed].folder} has the same settings and seed")
        else:
            seeds[run.seed] = run
    return [list(seeds.values()) for seeds in groups.values()], remarks


def _published(run: Run, rows: Iterable[Published]) -> list[Published]:
    """The published rows that a run repeats, of several tables. On ImageNet: the same backbone, method and n, and no
    label, which ablations have; of those, the rows of as many epochs or else the first. On COCO: the configuration's
    name."""
    if run.task == DETECTION:
        return [known for known in rows if known.task == DETECTION and known.name == run.name]
    if run.data != CLASSIFICATION or run.config.get("label", run.backbone) != run.backbone:
        return []
    found = [
        known
        for known in rows
        if known.task == CLASSIFICATION
        and run.backbone in (known.label, known.backbone)
        and (run.dynamic, run.n) == (known.dynamic, known.n)
    ]
    return [known for known in found if known.epochs == (run.asked or run.epochs)] or found[:1]


def _order(row: Row) -> tuple[str, int, str]:
    return row.data, row.params or 0, row.name
