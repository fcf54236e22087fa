"""Run folders: which ones this command made, so that it takes back those, and no others, that nothing came of.

Hydra makes a job's folder before it calls us. It does not say what was there before, and would stop a whole sweep with
a traceback at a folder that cannot be made; so it is given a path that leaves both to `make`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path, PosixPath
from typing import Any

import hydra.core.utils
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from train.jobs.errors import ConfigError
from train.jobs.folder import remove_lock

made: set[Path] = set()  # by this process


def make(folder: Path) -> None:
    """Make a folder with those that lead to it.

    Raises:
        ConfigError: it cannot be made.
    """
    folder = Path(os.path.abspath(folder))
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The run folder {folder} cannot be made: {error.strerror}.") from None
    finally:  # some that lead to it may have been made
        made.update(path for path in new if os.path.exists(path))


def take_back(folder: Path) -> None:
    """Remove the folder of a job that left nothing, and those above it, as far as this process made them."""
    remove_lock(folder)
    for path in (folder, *folder.parents):
        if not os.path.exists(path):  # it could not be made
            continue
        if path not in made:
            return
        try:
            path.rmdir()
        except OSError:  # not empty
            return
        made.discard(path)


class JobFolder(PosixPath):
    """What Hydra makes before it calls a job; the job itself tells of one that could not be made."""

    def mkdir(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(ConfigError):
            make(Path(self))


hydra.core.utils.Path = JobFolder  # type: ignore[attr-defined]


class SweepFolder(Callback):
    """The folder above those of a sweep's jobs, made before Hydra does (configs/train.yaml)."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            make(Path(config.hydra.sweep.dir))
        except ConfigError as error:
            sys.exit(f"ConfigError: {error}")
