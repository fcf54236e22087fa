"""What must be the same for a run to resume: the settings that decide what is learned, and the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.config import TrainConfig, learnt_settings, load_saved
from train.data.run_data import RunData
from train.jobs.checkpoints import State
from train.jobs.errors import ConfigError

REMEDY = "Set it back to resume, or give the new run another label=..."


def check_same_settings(saved: dict[str, Any], config: TrainConfig, folder: Path) -> list[str]:
    """Compare a checkpoint's settings with this run's.

    Returns:
        What has changed, may change, and is worth a line.

    Raises:
        ConfigError: a setting that decides what is learned is another.
    """
    then = load_saved(saved)
    before, after = learnt_settings(then), learnt_settings(config)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            raise ConfigError(
                f"{folder} was trained with {key}={before.get(key)}, now it is {after.get(key)}. {REMEDY}"
            )
    was, is_now = then.runtime.micro_batch, config.runtime.micro_batch
    # It changes batch statistics, but another number of devices may need it.
    return [f"Resuming with runtime.micro_batch={is_now}; it was {was}."] if was != is_now else []


def check_same_data(state: State, data: RunData, folder: Path) -> None:
    """Compare a checkpoint's classes and images with this run's; where they are does not matter.

    Raises:
        ConfigError: they are others.
    """
    then, now = list(state["classes"]), data.classes
    other = [] if then == now else [f"other classes ({_some(then)}; now {_some(now)})"]
    for split, before in state.get("data", {}).items():
        after = data.identity[split]
        if before["images"] != after["images"]:
            other.append(f"{before['images']} {split} images (now {after['images']})")
        elif before["names"] != after["names"]:
            other.append(f"other names of {split} images")
    if other:
        root = data.config.data.root
        raise ConfigError(
            f"data.root={root!r}: {folder} was trained on other data, with {' and '.join(other)}. {REMEDY}"
        )


def _some(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
