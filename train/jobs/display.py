"""What a run shows: a progress bar on a terminal; elsewhere plain lines, a few for each epoch."""

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

    LINES_PER_EPOCH = 4
    REFRESH_SECONDS = 0.5

    def __init__(self, main: bool, steps: int = 0, steps_per_epoch: int = 0, out: IO[str] | None = None):
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self.console = Console(file=out, quiet=not main, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.shown = 0.0  # when the bar was updated last
        if main and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))
            stays = out is None  # where standard output is redirected, what others print is not for the user
            self.bar = Progress(*columns, *times, console=self.console, transient=True, redirect_stdout=stays)

    def start(self, step: int) -> None:
        if self.bar:
            self.task = self.bar.add_task("", total=self.steps, completed=step)
            self.bar.start()

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()

    def wants(self, step: int) -> bool:
        """Whether to show this step. Its loss must be fetched from the device then, for which the host waits."""
        if self.bar:
            return time.monotonic() - self.shown > self.REFRESH_SECONDS
        every = -(-self.steps_per_epoch // self.LINES_PER_EPOCH)
        return self.steps_per_epoch > 100 and (step + 1) % every == 0

    def update(self, step: int, text: str) -> None:
        """Show a step that is done."""
        self.shown = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=step + 1, description=text)
        else:
            self.print(f"{text}  step {step + 1}/{self.steps}")

    def print(self, text: str) -> None:
        self.console.print(text, markup=False)


def duration(seconds: float) -> str:
    """`3723.4` to `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
