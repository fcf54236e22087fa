"""Services that show a run while it goes on, through MMEngine's own backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config

from detection.config import DetectionConfig
from train.jobs.errors import writing
from train.jobs.wandb_run import check_login, run_id


def watch(config: DetectionConfig, cfg: Config, folder: Path) -> None:
    """Add MMEngine's backends for the services of the logger group.

    Raises:
        ConfigError: wandb is to be online, and nobody is logged in.
    """
    for service in config.logger.services:
        place = folder / service
        if service == "tensorboard":
            cfg.visualizer.vis_backends.append({"type": "TensorboardVisBackend", "save_dir": str(place)})
        else:
            settings = wandb_settings(config, place)
            backend = {"type": "WandbVisBackend", "save_dir": str(place), "init_kwargs": settings}
            cfg.visualizer.vis_backends.append(backend)


def wandb_settings(config: DetectionConfig, place: Path) -> dict[str, Any]:
    """What wandb.init takes: one wandb run for a run folder, however often it is resumed; its id is kept there."""
    import wandb  # takes a second, and is seldom asked for

    logger = config.logger
    check_login(wandb, logger.mode)
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    return {
        "id": run_id(place / "id"),
        "resume": "allow",
        "name": f"{config.name}/seed{config.seed}",
        "mode": logger.mode,
        "project": logger.project,
        "entity": logger.entity,
        "group": logger.group,
        "settings": {"console": "off", "silent": logger.mode == "offline"},
    }
