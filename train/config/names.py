"""Names of run folders, as published rows are called: `resnet18`, `resnet18_kw1d4x`, `resnet18_odconv4x`; a method
without budget, `resnet18_se`. Settings that differ from what the chosen groups say follow:
`resnet18_kw1d4x+recipe.lr-0.1`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import hydra
from hydra.conf import HydraConf
from omegaconf import OmegaConf

from kw.baselines.registry import BASELINES
from kw.config import STATIC, format_budget
from train.config.schema import TrainConfig
from train.jobs.names import differences, extended
from train.jobs.settings import fixed_settings
from train.jobs.sweep import key_of

# Groups whose option is in a run folder's path, by backbone.label, label or data.name.
IN_PATH = ("backbone", "data", "experiment", "experiment/ablation")
# Settings that are in the path.
SHOWN = {"n", "dynamic", "seed", "data.name", "backbone.label"}


def run_name(label: str, dynamic: str, n: Any) -> str:
    """A run's name without further settings; n must be valid."""
    if STATIC in (n, dynamic):
        return label
    has_budget = dynamic not in BASELINES or BASELINES[dynamic].budget
    return f"{label}_{dynamic}" + (format_budget(n) if has_budget else "")


def full_name(config: TrainConfig, job: HydraConf) -> str:
    """A run's name, with the settings that decide what it learns and differ from those of the chosen groups.

    Args:
        job: Hydra's own part of the composed configuration.
    """
    groups = {key_of(word): word for word in job.overrides.task if key_of(word) in job.runtime.choices}
    path = [word for key, word in groups.items() if key in IN_PATH]
    recipe = [groups["recipe"]] if "recipe" in groups else []
    chosen = hydra.compose(job.job.config_name, path + recipe)
    chosen.label = chosen.backbone.label = ""  # interpolations of backbone.name, which backbone=timm leaves open
    plain = cast(dict[str, Any], OmegaConf.to_container(chosen, resolve=True))
    before, after = (fixed_settings(settings, TrainConfig) for settings in (plain, asdict(config)))
    shown = SHOWN | ({"backbone.name"} if config.label == config.backbone.name else set())
    changes = {key: value for key, value in differences(after, before).items() if key not in shown}
    if recipe:
        usual = hydra.compose(job.job.config_name, path, return_hydra_config=True).hydra.runtime.choices["recipe"]
        if usual != job.runtime.choices["recipe"]:
            changes["recipe"] = job.runtime.choices["recipe"]
    return extended(run_name(config.label, config.dynamic, config.n), changes)
