"""A run of Weights & Biases for a run folder. The package itself is passed in: kw stands on torch and timm alone."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from train.jobs.errors import ConfigError
from train.jobs.folder import write_whole


def run_id(path: Path) -> str:
    """The id in a file, made up where there is none."""
    if not path.exists():
        write_whole(path, secrets.token_hex(4))
    return path.read_text()


def check_login(wandb: Any, mode: str) -> None:
    """Raises ConfigError: nobody is logged in, which would be asked for in the midst of the start."""
    if mode == "online" and not wandb.login(prompt=False, verify=False):  # wandb.init verifies
        raise ConfigError(
            "logger.mode=online: no wandb login is known here. Run `wandb login` or set WANDB_API_KEY; or with "
            "logger.mode=offline, `wandb sync` the run folder's wandb/ later."
        )
