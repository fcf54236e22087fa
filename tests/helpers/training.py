"""The real configurations, composed and shrunk; the trainer, in this process or through the command line."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from train.config import TrainConfig, compose
from train.jobs.world import World

ROOT = Path(__file__).parents[2]
TINY = ["recipe.epochs=1", "recipe.warmup_epochs=0", "recipe.batch_size=256", "data.image_size=16"]
NARROW = ["backbone.kwargs.channels=[8,8,8,16]", "backbone.kwargs.stem_width=8"]
ALONE = World(0, 1, torch.device("cpu"))
SECONDS = 240  # after which a process that a test started counts as hung


def config(*overrides: str) -> TrainConfig:
    return compose(overrides)


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that runs this clone's programs on one thread, anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run(*command: str, check: bool = True, timeout: float = SECONDS, **more) -> subprocess.CompletedProcess:
    """`subprocess.run` with captured text, this clone's environment and a time limit; on failure shows stderr."""
    options = {"env": environment(), "capture_output": True, "text": True, "timeout": timeout, **more}
    done = subprocess.run([*map(str, command)], **options)
    assert not check or done.returncode == 0, done.stderr
    return done


def launch(*overrides: str, cwd, check: bool = True, shrunk=(*TINY, *NARROW)) -> subprocess.CompletedProcess:
    """`python -m train` with a tiny configuration."""
    flags = [word for word in overrides if word.startswith("-")]
    others = [word for word in overrides if word not in flags]
    command = [sys.executable, "-m", "train", *flags, *shrunk, *others]
    return run(*command, cwd=cwd, check=check, env=environment(COLUMNS="200"))
