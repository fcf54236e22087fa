"""`python -m helpers.disturbed CODE FOLDER OVERRIDES...`: train, but first run the file CODE in each process.

CODE finds the `trainer` there, and its `world`; it adds callbacks to the trainer, such as one that waits at a step.
How each process ends is printed in a line.
"""

import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

from train.config import TrainConfig, compose
from train.jobs.errors import NonFiniteError
from train.jobs.launch import launch
from train.jobs.world import connect, disconnect
from train.trainer import Trainer


def at(trainer: Trainer, step: int, do) -> None:
    """Have `do()` called right after optimizer step number `step`, counted from 1."""
    trainer.on_step.append(lambda current: do() if current.step == step else None)


def in_loss(trainer: Trainer, step: int, change) -> None:
    """Have the loss of the step that follows `step` steps replaced by `change(loss)`."""
    loss = trainer.learner.loss
    trainer.learner.loss = lambda *batch: change(loss(*batch)) if trainer.step == step else loss(*batch)


def until_signalled(trainer: Trainer, mark: str) -> None:
    """Leave the file `mark`, and wait for a signal that asks this process to stop."""
    Path(mark).touch()
    while not any(trainer.stop.came()):
        time.sleep(0.01)


def work(config: TrainConfig, folder: Path, code: Path) -> None:
    world = connect(config.runtime)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, folder, world)
    tools = {"at": at, "in_loss": in_loss, "until_signalled": until_signalled}
    modules = {"math": math, "os": os, "signal": signal, "torch": torch}
    exec(code.read_text(), {**tools, **modules, "trainer": trainer, "world": world})
    try:
        trainer.fit()
        print(f"process {world.rank} finished\n", end="", flush=True)
    except SystemExit as left:
        print(f"process {world.rank} left with {left.code} after step {trainer.step}\n", end="", flush=True)
        raise
    except NonFiniteError as error:
        print(f"process {world.rank} raised {error}\n", end="", flush=True)
    finally:
        disconnect()


if __name__ == "__main__":
    config = compose(sys.argv[3:])
    # By its importable name: workers are new processes, which import the function.
    from helpers import disturbed

    launch(disturbed.work, (config, Path(sys.argv[2]), Path(sys.argv[1])), config.runtime, "disturbed")
