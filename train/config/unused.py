"""Settings that somebody typed, and that a run does not use: they may be mistakes, so they are refused or reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from train.config.schema import TrainConfig

REMOTE = tuple(f"data.remote.{key}" for key in ("index", "cache", "cache_gb", "retries", "timeout"))
# Keys, whether a training run uses them, and the setting that decides it.
IN_TRAINING: tuple[tuple[tuple[str, ...], Callable[[TrainConfig], bool], str], ...] = (
    (("recipe.decay_epochs", "recipe.decay_rate"), lambda c: c.recipe.schedule == "step", "recipe.schedule"),
    (("recipe.min_lr",), lambda c: c.recipe.schedule == "cosine", "recipe.schedule"),
    (("recipe.nesterov",), lambda c: c.recipe.optimizer == "sgd", "recipe.optimizer"),
    (("recipe.betas", "recipe.eps"), lambda c: c.recipe.optimizer != "sgd", "recipe.optimizer"),
    (("recipe.drop_path_rule",), lambda c: c.recipe.drop_path > 0, "recipe.drop_path"),
    (("recipe.augment.erasing_mode",), lambda c: c.recipe.augment.random_erasing > 0, "recipe.augment.random_erasing"),
    (("data.root",), lambda c: c.data.format != "digits", "data.format"),
    (("data.window", "data.parts"), lambda c: c.data.format == "shards", "data.format"),
    (REMOTE, lambda c: ":" in (c.data.root or ""), "data.root"),
    (("logger.mode", "logger.project", "logger.entity"), lambda c: "wandb" in c.logger.services, "logger.services"),
)
# What an evaluation does not use of the groups that it may set.
IN_EVALUATION = (
    *("data.train_split", "data.train_images", "data.on_error", "data.window"),
    *(f"runtime.{key}" for key in ("channels_last", "compile", "sync_norm")),
    *(f"runtime.{key}" for key in ("checkpoint_steps", "keep_best", "profile_steps")),
    *("logger", "seed", "resume", "start_from", "name"),
)
EVALUATED = (
    "recipe.augment.eval_resize",
    "recipe.augment.eval_interpolation",
)  # of a recipe, with a released checkpoint


def unused_in_training(config: TrainConfig, typed: Sequence[str]) -> list[str]:
    """A sentence for each typed key that training with this configuration does not use."""
    found = []
    for keys, uses, decider in IN_TRAINING:
        value: Any = config
        for part in decider.split("."):
            value = getattr(value, part)
        found += [f"{key} is not used with {decider}={value}." for key in keys if key in typed and not uses(config)]
    return found


def unused_in_evaluation(typed: Sequence[str]) -> list[str]:
    """The typed keys that an evaluation does not use."""
    return [
        key
        for key in typed
        if key.startswith("logger.") or key in IN_EVALUATION or (key.startswith("recipe.") and key not in EVALUATED)
    ]
