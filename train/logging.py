"""What a run leaves and shows: metrics.jsonl, summary.json, and lines or a progress bar."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from train.jobs.errors import writing
from train.jobs.folder import write_whole


class MetricsFile:
    """`metrics.jsonl`: one line an epoch, on disk before the checkpoint of that epoch is."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """The complete lines."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def keep_before(self, epoch: int) -> None:
        """Drop lines of `epoch` and later, which a resumed run will write again, and one that was cut off."""
        lines = [json.dumps(line) + "\n" for line in self.read() if line["epoch"] < epoch]
        write_whole(self.path, "".join(lines))

    def append(self, line: dict[str, Any]) -> None:
        """Raises WriteError; what the line left of itself is not a complete one."""
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Display:
    """A progress bar on a terminal; elsewhere plain lines, a few an epoch. Silent on all processes but the main one."""

    LINES_PER_EPOCH = 4
    REFRESH_SECONDS = 0.5

    def __init__(self, main: bool, epochs: int, steps_per_epoch: int):
        self.console = Console(quiet=not main, highlight=False, soft_wrap=True)
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.last = 0.0
        if main and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))
            self.bar = Progress(*columns, *times, console=self.console, transient=True)

    def start(self, step: int) -> None:
        if self.bar:
            self.task = self.bar.add_task("", total=self.epochs * self.steps_per_epoch, completed=step)
            self.bar.start()

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()

    def wants(self, step: int) -> bool:
        """Whether to show step `step`: its loss must then be fetched from the device, which waits for it."""
        if self.bar:
            return time.monotonic() - self.last > self.REFRESH_SECONDS
        every = -(-self.steps_per_epoch // self.LINES_PER_EPOCH)
        return self.steps_per_epoch > 100 and (step + 1) % every == 0

    def show(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        self.last = time.monotonic()
        epoch = step // self.steps_per_epoch + 1
        text = f"epoch {epoch}/{self.epochs}  loss {loss:.3f}  acc {accuracy:.1f}%  {images_per_second:,.0f} images/s"
        if self.bar:
            self.bar.update(self.task, completed=step + 1, description=text)
        else:
            self.print(f"{text}  step {step + 1}/{self.epochs * self.steps_per_epoch}")

    def epoch(self, line: dict[str, Any], left: float) -> None:
        ema = f"  ema {line['ema_top1']:.2f}" if "ema_top1" in line else ""
        self.print(
            f"epoch {line['epoch'] + 1:>3}/{self.epochs}  loss {line['train_loss']:.3f}  "
            f"top-1 {line['top1']:.2f}  top-5 {line['top5']:.2f}{ema}  tau {line['temperature']:.2f}  "
            f"{line['images_per_second']:,.0f} images/s  {_duration(left)} left"
        )

    def print(self, text: str) -> None:
        self.console.print(text, markup=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
