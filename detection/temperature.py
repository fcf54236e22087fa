"""The temperature warm-up (paper, section 3.3) for a backbone that begins without a classification checkpoint."""

from __future__ import annotations

from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

import kw


@HOOKS.register_module()
class TemperatureWarmup(Hook):
    """`custom_hooks = [dict(type="TemperatureWarmup", steps=500)]`: from 1 to 0 over the first `steps` steps.

    At 1 each mixture is anchored to a cell of its own, as in a static layer; at 0 the attention is free. Fine-tuning a
    checkpoint begins at 0, and needs no such hook.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter <= self.steps:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            kw.set_temperature(model.backbone, max(0.0, 1 - (runner.iter + 1) / self.steps))
