"""The model of a checkpoint, and images by class: from a folder, or from the data set that the model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from scripts.checkpoints import open_checkpoint
from scripts.pictures import SUFFIXES, pictures_in, read_picture
from train.config import TrainConfig
from train.data.formats import open_split
from train.data.transforms import eval_transform
from train.jobs.errors import ConfigError, check

BATCH = 32


@dataclass
class Options:
    """The command's own keys."""

    checkpoint: str = ""  # a file or a run folder: our own, or a released file
    images: str = ""  # a folder of images, or of a folder for each class; empty: the data set's
    classes: int = 10  # at most this many, evenly spaced
    per_class: int = 50  # images of each
    ema: bool = False  # the average of the weights
    out: str = "report/attentions"

    def __post_init__(self) -> None:
        check(bool(self.checkpoint), "checkpoint", self.checkpoint, "must be a run folder or a checkpoint's file")
        for key in ("classes", "per_class"):
            check(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")


def load_model(options: Options, overrides: list[str]) -> tuple[nn.Module, TrainConfig, str]:
    """The model in evaluation mode, its configuration, and the checkpoint's name (`scripts.checkpoints`).

    Raises:
        CheckpointError: it cannot be read or does not fit.
        ConfigError: settings are missing or too many, or the model has no dynamic layer.
    """
    opened = open_checkpoint(options.checkpoint, overrides, options.ema, attentive=True)
    model, config = opened.model, opened.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), config, f"{config.name}, {opened.path.name}"


Loads = list[tuple[Callable[[], Image.Image], int]]  # how to load an image, and the number of its class


def choose_images(options: Options, config: TrainConfig) -> tuple[list[str], Loads]:
    """Names of the classes, and their images.

    Raises:
        ConfigError: there are no images.
    """
    classes, loads = _from_folder(options) if options.images else _from_data_set(config)
    kept = _evenly(sorted({target for _, target in loads}), options.classes)
    chosen: Loads = []
    for number, target in enumerate(kept):
        own = [load for load, its in loads if its == target]
        chosen += [(load, number) for load in _evenly(own, options.per_class)]
    return [classes[target] for target in kept], chosen


def _evenly(items: list[Any], most: int) -> list[Any]:
    """At most `most`, evenly spaced."""
    return items if len(items) <= most else [items[k * len(items) // most] for k in range(most)]


def _from_folder(options: Options) -> tuple[list[str], Loads]:
    root = Path(options.images).expanduser()
    if not root.is_dir():
        raise ConfigError(f"images={options.images}: there is no such folder.")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and pictures_in(path)) or [root]
    loads: Loads = [
        (partial(read_picture, path), k) for k, folder in enumerate(folders) for path in pictures_in(folder)
    ]
    if not loads:
        raise ConfigError(f"images={options.images}: no images there ({', '.join(sorted(SUFFIXES))}).")
    return [folder.name for folder in folders], loads


def _from_data_set(config: TrainConfig) -> tuple[list[str], Loads]:
    images = open_split(config.data, config.data.eval_split)
    targets = getattr(images, "targets", None)
    if targets is None:  # in shards, an image's class is known once it is read
        targets = [images.load(index)[1] for index in range(len(images))]
    return list(images.classes), [
        (lambda index=index: images.load(index)[0], int(target)) for index, target in enumerate(targets)
    ]


def batches(loads: Loads, config: TrainConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as the model is evaluated on them, `(B, 3, H, W)`, and the numbers of their classes `(B,)`."""
    transform = eval_transform(config.data, config.recipe)
    for first in range(0, len(loads), BATCH):
        part = loads[first : first + BATCH]
        yield torch.stack([transform(load()) for load, _ in part]), torch.tensor([target for _, target in part])
