"""An evaluation in which every image counts once, by one model, whatever the number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from detection.guard import unwrapped
from train.jobs.errors import RunError
from train.jobs.world import World


class EvaluationHook(Hook):
    """Sends rank 0's running statistics to all ranks before an evaluation, and counts its images.

    Attributes:
        images: that the last evaluation has counted, on all ranks.

    Raises:
        RunError: it has counted another number of images than the data set has.
    """

    priority = "VERY_HIGH"  # before others use the metrics

    def __init__(self, world: World, folder: Path):
        self.world, self.folder = world, folder
        self.images = 0

    def before_val_epoch(self, runner: Any) -> None:
        self._start(runner.model, runner.val_loop)

    def before_test_epoch(self, runner: Any) -> None:
        self._start(runner.model, runner.test_loop)

    def _start(self, model: Any, loop: Any) -> None:
        self.images = 0
        self.world.share_buffers(unwrapped(model))
        for metric in loop.evaluator.metrics:
            if self.world.size > 1 and getattr(metric, "collect_device", None) == "cpu":
                metric.collect_dir = str(self.folder / ".results")  # else .dist_test/ in the user's working directory

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.images += len(outputs)

    after_test_iter = after_val_iter

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._finish(len(runner.val_dataloader.dataset))

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._finish(len(runner.test_dataloader.dataset))

    def _finish(self, there: int) -> None:
        self.images = int(self.world.sum(torch.tensor(self.images, device=self.world.device)))
        if self.images != there:
            raise RunError(
                f"The evaluation has counted {self.images} images, and the data set has {there}: the configuration's "
                f"val_dataloader or test_dataloader has a sampler that leaves out or repeats some."
            )
