"""From one command to one process or many: here, in new ones (train.jobs.launch), or with torchrun around it."""

from __future__ import annotations

import os
from pathlib import Path

from train.config import TrainConfig
from train.data.batching import accumulation
from train.jobs.errors import ConfigError
from train.jobs.launch import launch as launch_processes
from train.jobs.slurm import rendezvous
from train.run import run


def launch(config: TrainConfig, folder: Path) -> None:
    """Run the job: here, if it is one process or if torchrun has started this one; else in `runtime.devices` new ones.

    With `runtime.nodes` > 1 the same command runs on every node, and the nodes meet at `runtime.rendezvous`.

    Raises:
        LaunchError: a worker failed. Errors of a job that runs here come as they are.
        ConfigError: the batch cannot be shared out to the devices, or nobody says where nodes meet.
    """
    runtime = config.runtime
    devices = runtime.devices * runtime.nodes
    if "RANK" in os.environ or devices == 1:
        run(config, folder)
        return
    if config.evaluate is None:  # what can be told without them is told before workers start
        accumulation(config.recipe.batch_size, runtime.micro_batch, devices)
    endpoint, name = meeting_point(config)
    arguments = (config, folder)
    launch_processes(run, arguments, processes=runtime.devices, nodes=runtime.nodes, endpoint=endpoint, name=name)


def meeting_point(config: TrainConfig) -> tuple[str, str | None]:
    """Where the nodes' launchers meet, and the name that they know each other by (None: a new one).

    Raises:
        ConfigError: there are several nodes, and nobody says where.
    """
    runtime = config.runtime
    if runtime.nodes == 1:
        return runtime.rendezvous or "localhost:0", None
    if runtime.rendezvous:
        # without slashes, as torch makes a folder of it
        return runtime.rendezvous, f"{config.data.name}-{config.name}-seed{config.seed}"
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(f"runtime.nodes={runtime.nodes}: where do they meet? runtime.rendezvous=FIRST_NODE:PORT.")
    return rendezvous(os.environ)
