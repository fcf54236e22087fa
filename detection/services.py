"""Services that show a run while it runs, through MMEngine's own backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config

from detection.config import DetectionConfig
from train.jobs.weights_and_biases import import_wandb, settings

BACKENDS = {"tensorboard": "TensorboardVisBackend", "wandb": "WandbVisBackend"}


def watch(config: DetectionConfig, cfg: Config, folder: Path) -> None:
    """Add MMEngine's backends for the services of the logger group. Only rank 0 may call this.

    Raises:
        ConfigError: wandb is not installed, or is to be online and nobody is logged in.
        WriteError: the folder cannot be written.
    """
    for service in config.logger.services:
        place = folder / service
        backend: dict[str, Any] = {"type": BACKENDS[service], "save_dir": str(place)}
        if service == "wandb":
            import_wandb(config.logger.mode)
            backend["init_kwargs"] = settings(config.logger, place, config.name, config.seed)
        cfg.visualizer.vis_backends.append(backend)
