"""The real configurations, composed and shrunk; `python -m train` with them."""

import copy
import functools
import subprocess

import torch

from helpers import programs
from helpers.programs import environment
from train.config import TrainConfig, compose
from train.jobs.world import World

# Five steps an epoch, on a part of the digits: most of a short run's time is spent on images.
TINY = [
    "recipe.epochs=1",
    "recipe.warmup_epochs=0",
    "recipe.batch_size=64",
    "data.train_images=320",
    "data.image_size=16",
]
NARROW = ["backbone.kwargs.channels=[8,8,8,16]", "backbone.kwargs.stem_width=8"]
ALONE = World(0, 1, torch.device("cpu"))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> TrainConfig:
    return compose(overrides)


def config(*overrides: str) -> TrainConfig:
    """A configuration of one's own. Hydra takes a quarter of a second, so that each is composed once."""
    return copy.deepcopy(_composed(overrides))


def launch(*overrides: str, cwd, check: bool = True, shrunk=(*TINY, *NARROW)) -> subprocess.CompletedProcess:
    """`python -m train` with a tiny configuration."""
    words = [*shrunk, *overrides]
    flags = [word for word in words if word.startswith("-")]
    others = [word for word in words if word not in flags]
    return programs.run("train", *flags, *others, cwd=cwd, code=0 if check else None, env=environment(COLUMNS="200"))
