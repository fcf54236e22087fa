"""One process of a job: connect, build, go on or begin, train or evaluate, leave."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import yaml

from train.config import TrainConfig, to_plain
from train.evaluate import evaluate_checkpoint
from train.jobs.folder import lock, write_whole
from train.jobs.world import World, connect, disconnect
from train.trainer import Trainer


def run(config: TrainConfig, folder: Path) -> None:
    """Do the job in `folder`, as this process's part of it.

    Raises:
        RunError: with a message for the user.
        SystemExit: a signal asked to save and leave.
    """
    world = connect(config.runtime)
    try:
        if config.evaluate is None:
            train(config, folder, world)
        else:
            results = evaluate_checkpoint(config, world)
            if world.is_main:
                print(json.dumps(results, indent=2))
    finally:
        disconnect()


def train(config: TrainConfig, folder: Path, world: World) -> None:
    with lock(folder) if world.is_main else contextlib.nullcontext():
        trainer = Trainer(config, folder, world)
        trainer.resume()
        if world.is_main:
            write_whole(folder / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
        summary = trainer.fit()
        trainer.display.print(
            f"{summary['name']}: top-1 {summary['top1']:.2f}, top-5 {summary['top5']:.2f}, "
            f"{summary['params']:,} parameters, {summary['macs']:,} multiply-adds. Everything is in {folder}."
        )
