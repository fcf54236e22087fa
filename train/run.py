"""A job: launched in one process or many, each of which connects, trains or evaluates, and leaves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from train.config import RuntimeConfig, TrainConfig, to_plain, unused_in_training
from train.data.batching import accumulation
from train.evaluate import evaluate_checkpoint
from train.jobs.agreement import agree, once_per_node
from train.jobs.errors import ConfigError, warn
from train.jobs.folder import lock, write_atomically
from train.jobs.launch import count_processes, launch
from train.jobs.provenance import provenance
from train.jobs.world import World, connect, disconnect
from train.trainer import Trainer


def start(config: TrainConfig, folder: Path, typed: Sequence[str] = ()) -> None:
    """Check what can be checked before workers start, and launch the job.

    Args:
        folder: the run folder.
        typed: the keys of the command line, which may replace settings of a checkpoint that is evaluated.

    Raises:
        LaunchError: a worker failed. Errors of a job that runs in this process are raised unchanged.
        ConfigError: the batch cannot be shared by the devices, or the processes cannot be launched as asked.
    """
    runtime = config.runtime
    count_processes(runtime, typed)
    if config.evaluate is None:
        for sentence in unused_in_training(config, typed):
            warn(sentence)
        accumulation(config.recipe.batch_size, runtime.micro_batch, runtime.devices * runtime.nodes)
    name = f"{config.data.name}-{config.name}-seed{config.seed}"
    launch(run, (config, folder, typed), runtime, name)


def run(config: TrainConfig, folder: Path, typed: Sequence[str] = ()) -> None:
    """The part of one process in the job.

    Raises:
        RunError: with a message for the user.
        SystemExit: a signal asked to save and leave.
    """
    world = connect(config.runtime)
    try:
        check_sync_norm(config.runtime, world)
        agree(world, "the code", once_per_node(world, provenance), "Bring all nodes to one commit and its versions.")
        if config.evaluate is None:
            train_in(config, folder, world)
        else:
            results = evaluate_checkpoint(config, typed, world)
            if world.is_main:
                print(json.dumps(results, indent=2))
    finally:
        disconnect()


def check_sync_norm(runtime: RuntimeConfig, world: World) -> None:
    """Raises ConfigError: torch can synchronize batch statistics on GPUs only."""
    if runtime.sync_norm and world.device.type == "cpu":
        raise ConfigError("runtime.sync_norm=true needs GPUs: torch synchronizes batch statistics only there.")


def train_in(config: TrainConfig, folder: Path, world: World) -> None:
    """Train in the run folder, or continue from its checkpoint."""
    with lock(folder) if world.is_main else contextlib.nullcontext():
        trainer = Trainer(config, folder, world)
        trainer.resume()
        if world.is_main:
            write_atomically(folder / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
        summary = trainer.fit()
        trainer.display.print(
            f"{summary['name']}: top-1 {summary['top1']:.2f}, top-5 {summary['top5']:.2f}, "
            f"{summary['params']:,} parameters, {summary['macs']:,} multiply-adds. Everything is in {folder}."
        )
