"""The cost of a row without runs, from the speed of its training step (`scripts.bench.step_time`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from scripts.report.published import TRAINING_IMAGES, Published

STEPS = Path("runs/steps.jsonl")


@dataclass(frozen=True)
class Step:
    """The speed at which one device trains a row, and the memory that it takes."""

    row: str
    device: str
    images_per_second: float
    memory_gb: float | None = None


def cost(step: Step, row: Published) -> float:
    """Hours that one such device needs to train the row, without evaluation and loading of images."""
    return row.epochs * TRAINING_IMAGES[row.task] / step.images_per_second / 3600


def read_steps(path: Path) -> tuple[list[Step], list[str]]:
    """The last timed step of each row in a file of JSON lines, and remarks on broken lines."""
    steps, remarks = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            step = Step(found["row"], found["device"], float(found["images_per_second"]), found.get("memory_gb"))
            if not step.images_per_second > 0:
                raise ValueError("images_per_second is not positive")
            if not isinstance(step.memory_gb, int | float | None):
                raise ValueError("memory_gb is not a number")
            steps[step.row] = step
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            remarks.append(f"{path}, line {number}: broken ({type(error).__name__}: {error})")
    return list(steps.values()), remarks
