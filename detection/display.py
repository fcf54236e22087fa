"""MMEngine's hook that shows a training, and its evaluations' metrics."""

from __future__ import annotations

import time
from typing import Any

from mmengine.hooks import Hook

from train.jobs.display import Display, duration, progress

RESULTS = {"coco/bbox_mAP": "box_ap", "coco/bbox_mAP_50": "box_ap50", "coco/segm_mAP": "mask_ap",
           "coco/segm_mAP_50": "mask_ap50"}  # fmt: skip
SHOWN = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP"}


class DisplayHook(Hook):
    """Forwards steps and evaluations to a display."""

    def __init__(self, display: Display):
        self.display = display
        self.first, self.began = 0, 0.0  # the step that this process began with, and when
        self.epoch_first, self.epoch_began = 0, 0.0  # the same, of the epoch

    def before_train(self, runner: Any) -> None:
        self.first, self.began = runner.iter, time.monotonic()
        self.display.steps = runner.max_iters
        self.display.start(runner.iter)

    def before_train_epoch(self, runner: Any) -> None:
        self.epoch_first, self.epoch_began = runner.iter, time.monotonic()

    def after_train(self, runner: Any) -> None:
        self.display.stop()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self.display.wants():
            return
        done = runner.iter + 1
        steps_per_second = (done - self.epoch_first) / (time.monotonic() - self.epoch_began)
        speed = steps_per_second * len(data_batch["inputs"]) * runner.world_size
        rate = runner.message_hub.get_scalar("train/lr").current()
        text = progress(runner.epoch + 1, runner.max_epochs, self._loss(runner), rate, speed)
        self.display.show(text, done, self._left(runner, done))

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._show_evaluation(batch_idx, runner.val_dataloader)

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._show_evaluation(batch_idx, runner.test_dataloader)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        text = f"epoch {runner.epoch or 1}/{runner.max_epochs}  loss {self._loss(runner):.3f}"
        self.display.print(
            f"{text}  {line(in_percent(metrics or {}))}  {duration(self._left(runner, runner.iter))} left"
        )

    def _show_evaluation(self, batch: int, loader: Any) -> None:
        if self.display.wants():
            self.display.show_evaluation(batch + 1, len(loader))

    def _loss(self, runner: Any) -> float:
        return float(runner.message_hub.get_scalar("train/loss").mean(window_size=50))

    def _left(self, runner: Any, done: int) -> float:
        """Seconds of training and evaluations that are left after `done` steps."""
        each = (time.monotonic() - self.began) / max(done - self.first, 1)
        return each * (runner.max_iters - done)


def in_percent(metrics: dict[str, Any]) -> dict[str, float]:
    """COCO's metrics in percent, by the names of metrics.jsonl and summary.json."""
    return {name: round(100 * metrics[key], 2) for key, name in RESULTS.items() if key in metrics}


def line(figures: dict[str, Any]) -> str:
    """`box AP 41.8  box AP50 62.1  mask AP 38.4`, of figures in percent."""
    return "  ".join(f"{name} {figures[key]:.1f}" for key, name in SHOWN.items() if key in figures)
