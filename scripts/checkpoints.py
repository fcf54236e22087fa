"""The model of a checkpoint: of our own, which contains its configuration, or of a released one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import OmegaConf
from torch import nn

import kw
from kw.layers import KWLayer
from scripts.options import imagenet_defaults
from train.config import TrainConfig, compose, load_saved, validate
from train.jobs.checkpoints import State, newest_or_warn
from train.jobs.errors import CheckpointError, ConfigError
from train.jobs.reading import FORMAT, read
from train.model import build_model, load_weights


@dataclass(frozen=True)
class Opened:
    """A checkpoint's model in evaluation mode, on the CPU.

    Args:
        state: what the file holds.
        classes: names of the classes; None for a released checkpoint.
        averaged: whether the weights are the average of a run.
    """

    path: Path
    model: nn.Module
    config: TrainConfig
    state: State
    classes: list[str] | None
    averaged: bool


def open_checkpoint(text: str, overrides: list[str], ema: bool | None = None, attentive: bool = False) -> Opened:
    """Build and load the model of a run folder or file.

    Our own checkpoint contains its configuration, in which `data.*` can be overridden. For a released one, the
    overrides are those of `python -m train`.

    Args:
        ema: whether to take the averaged weights; None: if there are any.
        attentive: whether the model must have attentions to cells.

    Raises:
        CheckpointError: it cannot be read or does not fit.
        ConfigError: settings are missing or too many, or the model has no average or no attentions.
    """
    path = Path(text).expanduser()
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    path, state = newest_or_warn(folder) if folder.is_dir() else (path, read(path))
    ours = state.get("format") == FORMAT
    config = _saved_config(path, state, overrides) if ours else _composed(path, overrides)
    if ema and not state.get("ema"):
        raise ConfigError(f"ema=true, but {path} has no average of the weights.")
    averaged = ours and bool(state["ema"]) and ema is not False
    classes = list(map(str, state["classes"])) if ours else None
    model = build_model(config, len(classes) if classes else config.data.num_classes or 1000)
    if attentive and not any(isinstance(module, KWLayer) for module in model.modules()):
        raise ConfigError(
            f"{path} is of {config.backbone.label} at n={config.n}, dynamic={config.dynamic}: "
            f"it has no attentions to a warehouse's cells."
        )
    try:
        if ours:
            load_weights(model, state["ema" if averaged else "model"])
        else:
            kw.load_released(model, state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit {config.backbone.label} at n={config.n}: {error}") from None
    return Opened(path, model.eval(), config, state, classes, averaged)


def _saved_config(path: Path, state: State, overrides: list[str]) -> TrainConfig:
    for word in overrides:
        if not word.startswith("data."):
            raise ConfigError(f"{path} contains its own settings: leave {word} out; only data.* can be overridden.")
    saved = OmegaConf.create(asdict(load_saved(state["config"])))
    return validate(OmegaConf.create(OmegaConf.merge(saved, OmegaConf.from_dotlist(overrides))))  # type: ignore[arg-type]


def _composed(path: Path, overrides: list[str]) -> TrainConfig:
    if not overrides:
        raise ConfigError(f"{path} is not a checkpoint of `python -m train`: add backbone=resnet18 n=1/4 or the like.")
    return compose([*imagenet_defaults(overrides), *overrides])
