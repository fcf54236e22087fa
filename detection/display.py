"""MMEngine's hook that shows a training, and its evaluations' metrics."""

from __future__ import annotations

import time
from typing import Any

from mmengine.hooks import Hook

from train.jobs.display import Display, duration

RESULTS = {"coco/bbox_mAP": "box_ap", "coco/bbox_mAP_50": "box_ap50", "coco/segm_mAP": "mask_ap",
           "coco/segm_mAP_50": "mask_ap50"}  # fmt: skip
SHOWN = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP"}


class DisplayHook(Hook):
    """Forwards steps and evaluations to a display."""

    def __init__(self, display: Display):
        self.display = display
        self.first, self.began = 0, 0.0  # the step that this process began with, and when

    def before_train(self, runner: Any) -> None:
        self.first, self.began = runner.iter, time.monotonic()
        self.display.steps, self.display.steps_per_epoch = runner.max_iters, len(runner.train_dataloader)
        self.display.start(runner.iter)

    def after_train(self, runner: Any) -> None:
        self.display.stop()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.display.wants(runner.iter):
            self.display.update(runner.iter, self._text(runner, runner.epoch + 1))

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        done = max(runner.iter - self.first, 1)
        left = (time.monotonic() - self.began) / done * (runner.max_iters - runner.iter)
        epoch = runner.epoch or 1
        self.display.print(f"{self._text(runner, epoch)}  {line(in_percent(metrics or {}))}  {duration(left)} left")

    def _text(self, runner: Any, epoch: int) -> str:
        loss = runner.message_hub.get_scalar("train/loss").mean(window_size=50)
        return f"epoch {epoch}/{runner.max_epochs}  loss {loss:.3f}"


def in_percent(metrics: dict[str, Any]) -> dict[str, float]:
    """COCO's metrics in percent, by the names of metrics.jsonl and summary.json."""
    return {name: round(100 * metrics[key], 2) for key, name in RESULTS.items() if key in metrics}


def line(figures: dict[str, Any]) -> str:
    """`box AP 41.8  box AP50 62.1  mask AP 38.4`, of figures in percent."""
    return "  ".join(f"{name} {figures[key]:.1f}" for key, name in SHOWN.items() if key in figures)
