"""One run of Weights & Biases for one run folder, however often that is resumed."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from train.jobs.errors import ConfigError, writing
from train.jobs.folder import write_once
from train.jobs.names import shorten
from train.jobs.settings import LoggerConfig


def import_wandb(mode: str) -> Any:
    """The package wandb.

    Raises:
        ConfigError: it is not installed, or mode is "online" and nobody is logged in.
    """
    try:
        import wandb  # takes a second
    except ImportError as error:
        raise ConfigError(f"logger.services: wandb cannot be imported ({error}).") from None
    if mode == "online" and not wandb.login(prompt=False, verify=False):  # wandb.init verifies
        raise ConfigError(
            "logger.mode=online: no wandb login is known here. Run `wandb login` or set WANDB_API_KEY; or with "
            "logger.mode=offline, `wandb sync` the run folder's wandb/ later."
        )
    return wandb


def settings(logger: LoggerConfig, place: Path, name: str, seed: int) -> dict[str, Any]:
    """Arguments of `wandb.init`. Only rank 0 may call this.

    Args:
        place: the folder, made here, that keeps the run's id.
        name: of the run folder.

    Raises:
        WriteError: the folder cannot be written.
    """
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        identity = write_once(place / "id", secrets.token_hex(4))
    return {
        "id": identity,
        "resume": "allow",  # offline it leaves another folder with this id, which `wandb sync` joins
        "name": f"{shorten(name, 100)}/seed{seed}",
        "mode": logger.mode,
        "project": logger.project,
        "entity": logger.entity,
        "group": logger.group,
        "settings": {"console": "off", "silent": logger.mode == "offline"},
    }
