"""`python -m train`: compose the configuration, check it, run. See configs/train.yaml and train/config.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from train.checkpoint import CheckpointError
from train.config import ConfigError, TrainConfig, to_plain, validate
from train.data import DataError
from train.distributed import connect, disconnect
from train.evaluate import evaluate_checkpoint
from train.logging import write_whole
from train.trainer import Trainer

EXPECTED = (ConfigError, DataError, CheckpointError, FloatingPointError)


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(composed: DictConfig) -> None:
    try:
        run(validate(composed), Path(HydraConfig.get().runtime.output_dir))
    except EXPECTED as error:
        sys.exit(f"{type(error).__name__}: {error}")  # the message says it all; a traceback would bury it


def run(config: TrainConfig, folder: Path) -> None:
    world = connect(config.runtime.device)
    if config.evaluate is not None:
        data_given = any(override.startswith("data") for override in HydraConfig.get().overrides.task)
        print(json.dumps(evaluate_checkpoint(config, world, data_given), indent=2))
        return
    trainer = Trainer(config, folder, world)
    trainer.resume()
    if world.is_main:
        write_whole(folder / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
    summary = trainer.fit()
    trainer.display.print(
        f"{summary['name']}: top-1 {summary['top1']:.2f}, top-5 {summary['top5']:.2f}, "
        f"{summary['params']:,} parameters, {summary['macs']:,} multiply-adds. Everything is in {folder}."
    )
    disconnect()


if __name__ == "__main__":
    main()
