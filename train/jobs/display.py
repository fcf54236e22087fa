"""What a run shows: a progress bar on a terminal; elsewhere the first step at once, and then a line a minute at least,
so that a log that stands still means a run that does."""

from __future__ import annotations

import time
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Silent on all ranks but rank 0.

    Args:
        main: whether this is rank 0.
        steps: of the run.
        out: where to print; None: standard output.
    """

    LINE_SECONDS = 60.0
    REFRESH_SECONDS = 0.5

    def __init__(self, main: bool, steps: int = 0, out: IO[str] | None = None):
        self.main, self.steps = main, steps
        self.console = Console(file=out, quiet=not main, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.shown: float | None = None  # when a line was printed last; None before the first step of training
        if main and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))
            stays = out is None  # where standard output is redirected, what others print is not for the user
            self.bar = Progress(*columns, *times, console=self.console, transient=True, redirect_stdout=stays)

    def start(self, step: int) -> None:
        """Training begins at this step."""
        self.shown = None
        if self.bar:
            self.task = self.bar.add_task("", total=self.steps, completed=step)
            self.bar.start()

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()

    def wants(self) -> bool:
        """Whether to show the current step, or how far an evaluation is: the first at once, then by the clock. A loss
        must be fetched from the device then, for which the host waits."""
        seconds = self.REFRESH_SECONDS if self.bar else self.LINE_SECONDS
        return self.main and (self.shown is None or time.monotonic() - self.shown >= seconds)

    def show(self, text: str, done: int, left: float) -> None:
        """Show how far training is.

        Args:
            done: steps.
            left: seconds.
        """
        self.shown = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=done, description=text)
        else:
            self.print(f"{text}  step {done}/{self.steps}  {duration(left)} left")

    def show_evaluation(self, done: int, total: int) -> None:
        """Show how far an evaluation is, in batches of one process."""
        text = f"evaluating: {done}/{total} batches"
        self.shown = time.monotonic()
        if self.bar:
            self.bar.update(self.task, description=text)
        else:
            self.print(text)

    def print(self, text: str) -> None:
        if self.shown is not None:
            self.shown = time.monotonic()
        self.console.print(text, markup=False)


def progress(epoch: int, epochs: int, loss: float, rate: float, speed: float, more: str = "") -> str:
    """`epoch 3/100  loss 2.345  lr 0.1  1,234 images/s`.

    Args:
        epoch: from 1.
        rate: of learning.
        speed: images per second.
        more: of a program's own, after the loss.
    """
    return f"epoch {epoch}/{epochs}  loss {loss:.3f}{more}  lr {rate:.3g}  {per_second(speed)} images/s"


def per_second(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def duration(seconds: float) -> str:
    """`3723.4` to `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
