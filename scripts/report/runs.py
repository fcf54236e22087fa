"""Reads run folders, finished or not; broken ones are reported and skipped.

A folder of `python -m train` has config.yaml, metrics.jsonl and, once finished, summary.json; one of
`python -m detection` has settings.json, metrics.jsonl and summary.json.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from kw.config import KW, STATIC
from scripts.report.published import CLASSIFICATION, DETECTION, SCORES
from train.jobs.outcomes import PLACE, not_done

MARKS = {"config.yaml", "metrics.jsonl", "summary.json", "settings.json"}  # any of them makes a folder a run's
# The loader in C, where there is one, is ten times as fast.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Broken(Exception):
    """A run folder cannot be read; the message says why."""


class Unfinished(Exception):
    """A run has no result to show yet."""


@dataclass(frozen=True)
class Run:
    """One run. `scores` are percentages, of the last epoch; `hours` are of training, times the number of devices."""

    folder: Path
    task: str
    name: str
    backbone: str
    data: str
    n: str
    seed: int
    scores: dict[str, float]
    finished: bool
    epochs: int  # finished
    asked: int | None  # epochs that the configuration asks for
    params: int | None = None
    macs: int | None = None
    images_per_second: float | None = None
    hours: float | None = None
    device: str | None = None
    ema: float | None = None  # the first score, of the average of the weights
    curve: list[tuple[int, float]] = field(default_factory=list)  # (epoch, the first of the scores)
    config: dict[str, Any] = field(default_factory=dict)
    dynamic: str = KW  # the method

    @property
    def train_images(self) -> int | None:
        """The number of training images, if not all of the data set."""
        data = self.config.get("data")
        return data.get("train_images") if isinstance(data, dict) else None


def find_runs(roots: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Runs at or below the folders, and a remark for each unfinished or broken one. Unfinished runs with at least one
    epoch are among the runs."""
    runs, remarks = [], []
    for folder in sorted({folder for root in roots for folder in _run_folders(root, remarks)}):
        try:
            run = read_run(folder)
        except Unfinished as error:
            remarks.append(f"{folder}: not finished ({error})")
        except Broken as error:
            remarks.append(f"{folder}: broken ({error})")
        except Exception as error:  # one bad folder of fifty must not end the report
            remarks.append(f"{folder}: broken ({type(error).__name__}: {error})")
        else:
            runs.append(run)
            if not run.finished:
                remarks.append(f"{folder}: not finished ({run.epochs} of {run.asked or '?'} epochs)")
    return runs, remarks


def _run_folders(root: Path, remarks: list[str]) -> Iterator[Path]:
    """Does not descend into run folders: services keep copies of a run's files there."""
    for place, folders, files in os.walk(root, onerror=lambda error: remarks.append(f"{error.filename}: {error}")):
        if PLACE in folders:
            remarks.extend(f"sweeps in {place}: {job}" for job in not_done(Path(place, PLACE).iterdir()))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if MARKS & {*files, *folders}:
            folders.clear()
            yield Path(place)


def read_run(folder: Path) -> Run:
    """Raises Broken or Unfinished, and what reading files raises."""
    summary = _mapping(folder / "summary.json", json.loads)
    config = _mapping(folder / "config.yaml", lambda text: yaml.load(text, Loader)) or {}
    detection = (folder / "settings.json").exists() or (summary is not None and "box_ap" in summary)
    task = DETECTION if detection else CLASSIFICATION
    lines = _lines(folder / "metrics.jsonl")
    if summary is not None:
        return _finished(folder, task, summary, config, lines)
    if not lines:
        raise Unfinished("it has no epoch yet")
    if detection:
        raise Unfinished(f"{len(lines)} epochs")
    return _unfinished(folder, config, lines)


def _finished(folder: Path, task: str, summary: Any, config: Any, lines: list[Any]) -> Run:
    it = Checked(summary, "summary.json")
    main = SCORES[task][0]
    scores = {key: it.percent(key) for key in SCORES[task] if key == main or summary.get(key) is not None}
    run = Run(
        folder, task, it.text("name"), it.text("backbone", "-"), it.text("data", "-" if task == DETECTION else None),
        it.text("n"), it.whole("seed"), scores, True, it.whole("epochs", len(lines)), None,
        it.whole("params", None), it.whole("macs", None), it.positive("images_per_second"),
        device=it.text("device", "-"), ema=it.positive(f"ema_{main}"), curve=_curve(lines, main), config=config,
        dynamic=_method(it),
    )  # fmt: skip
    return _timed(run, lines)


def _unfinished(folder: Path, config: Any, lines: list[Any]) -> Run:
    if not config:
        raise Broken("config.yaml and summary.json are not there")
    it = Checked(config, "config.yaml")
    data, backbone = it.part("data").text("name"), it.part("backbone").text("label")
    last, asked = Checked(lines[-1], "metrics.jsonl"), it.part("recipe").whole("epochs")
    scores = {key: last.percent(key) for key in SCORES[CLASSIFICATION]}
    speeds = [line.get("images_per_second") for line in lines]
    speed = median(speeds) if all(isinstance(speed, float) and speed > 0 for speed in speeds) else None
    run = Run(
        folder, CLASSIFICATION, it.text("name"), backbone, data, it.text("n"), it.whole("seed"), scores, False,
        len(lines), asked, images_per_second=speed, curve=_curve(lines, "top1"), config=config,
        dynamic=_method(it),
    )  # fmt: skip
    return _timed(run, lines)


def _method(it: Checked) -> str:
    """Detectors, and runs older than the other methods, do not name it."""
    return it.text("dynamic", STATIC if it.text("n") == STATIC else KW)


def _timed(run: Run, lines: list[Any]) -> Run:
    """The run with its device-hours: images over images per second, times devices; without evaluation."""
    recipe, runtime = (run.config.get(key) or {} for key in ("recipe", "runtime"))
    asked = run.asked or recipe.get("epochs") or run.epochs
    batch = recipe.get("batch_size")
    if not batch or not run.images_per_second or not (lines and lines[-1].get("step")):
        return replace(run, asked=asked)
    usual = runtime.get("devices", 1) * runtime.get("nodes", 1)  # lines of older versions do not say how many
    hours, before = 0.0, 0
    for line in lines:  # a run that was resumed may have had other devices
        step, speed = line.get("step", before), line.get("images_per_second") or run.images_per_second
        hours += (step - before) * batch / speed / 3600 * line.get("devices", usual)
        before = step
    return replace(run, asked=asked, hours=hours)


def _curve(lines: list[Any], key: str) -> list[tuple[int, float]]:
    """The score by epoch, from 1; epochs in which it is not a number are left out."""
    for line in lines:
        if not _is_number(line.get("epoch", 0)):
            raise Broken(f"an epoch of its metrics is {line['epoch']!r}, not a number")
    numbered = ((line.get("epoch", at) + 1, line.get(key)) for at, line in enumerate(lines))
    return [(epoch, float(value)) for epoch, value in numbered if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Checked:
    """A mapping that was read from a file. Its methods raise Broken, naming the key that is missing or wrong."""

    def __init__(self, values: Any, source: str):
        if not isinstance(values, dict):
            raise Broken(f"{source} holds a {type(values).__name__}, not keys and values")
        self.values, self.source = values, source

    def part(self, key: str) -> Checked:
        return Checked(self.values.get(key), f"{self.source}: {key}")

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._get(key, default))

    def whole(self, key: str, default: Any = ...) -> Any:
        """A whole number, or the default."""
        value = self.values.get(key)
        if value is None and default is not ...:
            return default
        if not _is_number(self._get(key)) or value != int(value) or value < 0:
            raise Broken(f"{self.source}: {key} is {value!r}, not a whole number")
        return int(value)

    def percent(self, key: str) -> float:
        value = self._get(key)
        if not _is_number(value) or not 0 <= value <= 100:
            raise Broken(f"{self.source}: {key} is {value!r}, not a number from 0 to 100")
        return float(value)

    def positive(self, key: str) -> float | None:
        value = self.values.get(key)
        return float(value) if _is_number(value) and value > 0 else None

    def _get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise Broken(f"{self.source} has no {key}")
        return value


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    """The keys and values of a JSON or YAML file; None where there is no such file."""
    if not path.exists():
        return None
    found = _parsed(path.read_text(encoding="utf-8"), parse, path.name)
    return {} if found is None and path.suffix == ".yaml" else Checked(found, path.name).values


def _parsed(text: str, parse: Callable[[str], Any], source: str) -> Any:
    try:
        return parse(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Broken(f"{source} cannot be read: {str(error).partition(chr(10))[0]}") from None


def _lines(path: Path) -> list[Any]:
    """The objects of a file of JSON lines. A last line without its end is still being written, and left out."""
    if not path.exists():
        return []
    complete = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    sources = (f"{path.name}, line {number}" for number in range(1, len(complete) + 1))
    return [
        Checked(_parsed(line, json.loads, source), source).values
        for source, line in zip(sources, complete, strict=True)
    ]
