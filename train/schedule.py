"""Learning rate and temperature as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import bisect
import math

from train.config import RecipeConfig


def learning_rate(step: int, steps_per_epoch: int, recipe: RecipeConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    It rises linearly over `warmup_epochs`, to `lr` in their last step; the first step has `lr` over their number or,
    with `warmup_from_zero`, 0. Then schedule `cosine` falls to `min_lr` at the end of training, `step` multiplies by
    `decay_rate` at each of `decay_epochs`, and `constant` stays at `lr`.
    """
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    total = recipe.epochs * steps_per_epoch
    if step < warmup:
        first = 0 if recipe.warmup_from_zero else 1
        return recipe.lr * (step + first) / max(1, warmup - 1 + first)
    if recipe.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * progress))
    if recipe.schedule == "step":
        decays = bisect.bisect_right(sorted(recipe.decay_epochs), step / steps_per_epoch)
        return recipe.lr * recipe.decay_rate**decays
    return recipe.lr


def temperature(micro_batch: int, per_epoch: int, temperature_epochs: float) -> float:
    """tau for forward pass number `micro_batch`, counted from 0 (paper, section 3.3): from 1 to 0 over the first
    `temperature_epochs` epochs of `per_epoch` micro-batches each."""
    warmup = per_epoch * temperature_epochs
    return max(0.0, 1 - (micro_batch + 1) / warmup) if warmup > 0 else 0.0
