"""What a training shows: a progress bar on a terminal, elsewhere plain lines; and a line for each evaluation."""

from __future__ import annotations

import time
from typing import IO, Any

from mmengine.hooks import Hook
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = {"coco/bbox_mAP": "box AP", "coco/bbox_mAP_50": "box AP50", "coco/segm_mAP": "mask AP"}


class Display(Hook):
    """A hook of MMEngine's runner.

    Args:
        out: where to print; None on all processes but the main one.
    """

    REFRESH_SECONDS = 0.5
    LINES_PER_EPOCH = 4

    def __init__(self, out: IO[str] | None):
        self.console = Console(file=out, quiet=out is None, highlight=False, soft_wrap=True)
        self.metrics: dict[str, Any] = {}
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.last = self.began = 0.0
        self.first = 0  # step that this process began with
        if out is not None and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self.bar = Progress(*columns, *times, console=self.console, transient=True, redirect_stdout=False)

    def before_train(self, runner: Any) -> None:
        self.first, self.began = runner.iter, time.monotonic()
        if self.bar:
            self.task = self.bar.add_task("", total=runner.max_iters, completed=runner.iter)
            self.bar.start()

    def after_train(self, runner: Any) -> None:
        if self.bar:
            self.bar.stop()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        steps = len(runner.train_dataloader)
        if self.bar and time.monotonic() - self.last > self.REFRESH_SECONDS:
            self.last = time.monotonic()
            self.bar.update(self.task, completed=runner.iter + 1, description=self._text(runner))
        elif not self.bar and steps > 100 and (batch_idx + 1) % -(-steps // self.LINES_PER_EPOCH) == 0:
            self.print(f"{self._text(runner)}  step {runner.iter + 1}/{runner.max_iters}")

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self.metrics = dict(metrics or {})
        done = max(runner.iter - self.first, 1)
        left = round((time.monotonic() - self.began) / done * (runner.max_iters - runner.iter))
        self.print(f"{self._text(runner, runner.epoch)}  {self.line(self.metrics)}  {left // 60}:{left % 60:02d} left")

    def _text(self, runner: Any, epoch: int | None = None) -> str:
        loss = runner.message_hub.get_scalar("train/loss").mean(window_size=50)
        return f"epoch {epoch or runner.epoch + 1}/{runner.max_epochs}  loss {loss:.3f}"

    @staticmethod
    def line(metrics: dict[str, Any]) -> str:
        """`box AP 41.8  box AP50 62.1  mask AP 38.4`."""
        return "  ".join(f"{name} {100 * metrics[key]:.1f}" for key, name in SHOWN.items() if key in metrics)

    def print(self, text: str) -> None:
        self.console.print(text, markup=False)
