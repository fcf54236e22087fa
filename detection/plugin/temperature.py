"""The temperature warm-up (paper, section 3.3), for a backbone that is trained without a classification checkpoint."""

from __future__ import annotations

from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

import kw

PUBLISHED = 12_500  # steps: 10 epochs of ImageNet in batches of 1,024


@HOOKS.register_module()
class TemperatureWarmup(Hook):
    """`custom_hooks = [dict(type="TemperatureWarmup")]`: tau falls from 1 to 0 over the first `steps` steps.

    At 1 each mixture is one cell, as a static layer has its kernel; at 0 the attention is unconstrained. A
    classification checkpoint is past its warm-up, so fine-tuning runs at 0, without this hook. A run much shorter than
    the warm-up trains nearly static kernels, and its checkpoints contain the temperature that they were trained at.
    """

    def __init__(self, steps: int = PUBLISHED):
        self.steps = steps

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter < self.steps:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            kw.set_temperature(model.backbone, 1 - (runner.iter + 1) / self.steps)
