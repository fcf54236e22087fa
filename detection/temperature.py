"""The temperature warm-up (paper, section 3.3) for a backbone that begins without a classification checkpoint."""

from __future__ import annotations

from typing import Any

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

import kw


@HOOKS.register_module()
class TemperatureWarmup(Hook):
    """`custom_hooks = [dict(type="TemperatureWarmup", part=0.5)]`: from 1 to 0 over the first half of all steps.

    At 1 each mixture is a cell of its own, as a static layer has its kernel; at 0 the attention is free. A checkpoint's
    attention has been through that, so fine-tuning begins at 0, without this hook.
    """

    def __init__(self, part: float = 0.5):
        self.part = part

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        kw.set_temperature(model.backbone, temperature(runner.iter, runner.max_iters, self.part))


def temperature(step: int, steps: int, part: float) -> float:
    """tau for step number `step` of `steps`, counted from 0."""
    return max(0.0, 1 - (step + 1) / (part * steps)) if part > 0 else 0.0
