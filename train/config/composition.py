"""From Hydra's composed configuration to checked dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from train.config.names import full_name
from train.config.schema import TrainConfig
from train.jobs.errors import ConfigError
from train.jobs.sweep import CONFIGS


def compose(overrides: Sequence[str] = ()) -> TrainConfig:
    """What `python -m train OVERRIDES` would run with, for programs other than it.

    Raises:
        ConfigError: naming the key.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose("train", list(overrides), return_hydra_config=True)
        job = composed.hydra
        with open_dict(composed):
            del composed["hydra"]
        return configure(composed, job)


def configure(composed: DictConfig, job: HydraConf) -> TrainConfig:
    """The checked configuration of a job, with its name.

    Args:
        job: Hydra's own part of the configuration.

    Raises:
        ConfigError: naming the key.
    """
    config = validate(composed)
    config.name = config.name or full_name(config, job)
    return config


def validate(settings: DictConfig | Mapping[str, Any]) -> TrainConfig:
    """Settings as checked dataclasses.

    Raises:
        ConfigError: naming the key.
    """
    # As plain values: nodes that have the schema already would keep keys that were added to them by "+".
    plain = OmegaConf.to_container(settings) if isinstance(settings, DictConfig) else settings
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), plain))
    except MissingMandatoryValue as error:
        key = error.full_key or str(error).rpartition(" ")[2]
        raise ConfigError(f"{key} must be set: {key}=... on the command line.") from None
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0] + (f" ({error.full_key})" if error.full_key else "")) from None
    assert isinstance(config, TrainConfig)
    return config
