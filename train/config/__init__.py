"""The configuration of a run. It has two forms: dataclasses (`schema`), and plain dictionaries in files (`saved`)."""

from train.config.composition import compose, configure, validate
from train.config.names import run_name
from train.config.saved import learnt_settings, load_saved, to_plain
from train.config.schema import (
    AugmentConfig,
    BackboneConfig,
    DataConfig,
    RecipeConfig,
    RemoteConfig,
    RuntimeConfig,
    SettingsConfig,
    TrainConfig,
)
from train.config.unused import unused_in_evaluation, unused_in_training

__all__ = [
    "AugmentConfig",
    "BackboneConfig",
    "DataConfig",
    "RecipeConfig",
    "RemoteConfig",
    "RuntimeConfig",
    "SettingsConfig",
    "TrainConfig",
    "compose",
    "configure",
    "learnt_settings",
    "load_saved",
    "run_name",
    "to_plain",
    "unused_in_evaluation",
    "unused_in_training",
    "validate",
]
