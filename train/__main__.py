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
failed: list[str] = []  # of a sweep's jobs


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(composed: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        run(validate(composed), folder)
    except EXPECTED as error:
        # The message says it all; a traceback would bury it, and an exit would stop a sweep's later jobs.
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        failed.append(folder.name)
        remove_if_empty(folder)


def run(config: TrainConfig, folder: Path) -> None:
    world = connect(config.runtime.device)
    if config.evaluate is not None:
        given = [override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task]
        print(json.dumps(evaluate_checkpoint(config, world, given), indent=2))
        remove_if_empty(folder)
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


def remove_if_empty(folder: Path) -> None:
    """Take back the folder that Hydra made for a run that left nothing, and those above it."""
    for path in (folder, *folder.parents):
        try:
            path.rmdir()
        except OSError:  # not empty
            return


if __name__ == "__main__":
    main()
    if failed:
        sys.exit(1)
