"""Data sets of images, and the order and augmentation of their samples as functions of (seed, epoch, index)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.config import DataConfig
from train.errors import ConfigError, DataError
from train.transforms import Transform


class Images(Protocol):
    """A data set: images by index, their targets and names."""

    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]: ...

    def describe(self, index: int) -> str: ...


class Digits:
    """scikit-learn's handwritten digits: every fifth is `val`, the others `train`; `all` is both."""

    def __init__(self, split: str):
        from sklearn.datasets import load_digits  # slow to import, and needed here alone

        if split not in ("train", "val", "all"):
            raise ConfigError(f"data: digits have no split {split!r}; there are train, val and all.")
        digits = load_digits()
        held_out = np.arange(len(digits.images)) % 5 == 4
        kept = {"train": ~held_out, "val": held_out, "all": np.ones_like(held_out)}[split]
        self.images = (digits.images[kept] * (255 / 16)).astype(np.uint8)  # (N, 8, 8), from 0 to 16 there
        self.targets = digits.target[kept]
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.targets[index])

    def describe(self, index: int) -> str:
        return f"digit {index}"


class Folder:
    """Images at `root/split/<class>/*`."""

    def __init__(self, root: Path, split: str):
        from torchvision.datasets import ImageFolder

        folder = root / split
        if not folder.is_dir():
            if not root.is_dir():
                raise ConfigError(f"data.root={str(root)!r} is no folder.")
            there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:6])
            raise ConfigError(
                f"data.root={str(root)!r} has no folder {split!r} of classes with images; "
                f"it has {there or 'no folders'}. "
                f"data.train_split and data.eval_split name the folders."
            )
        try:
            listing = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise ConfigError(f"data.root={str(root)!r}: {error}") from None
        self.samples, self.classes = listing.samples, listing.classes

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        with Image.open(path) as image:
            return image.convert("RGB"), target

    def describe(self, index: int) -> str:
        return self.samples[index][0]


def open_split(config: DataConfig, split: str) -> Images:
    """The images of one split.

    Raises:
        ConfigError: it is not there, is empty, or has another number of classes than data.num_classes.
    """
    images: Images = Digits(split) if config.format == "digits" else Folder(Path(config.root or "."), split)
    if config.num_classes is not None and len(images.classes) != config.num_classes:
        raise ConfigError(
            f"data.num_classes={config.num_classes}, but {split!r} of data.root={config.root!r} "
            f"has {len(images.classes)} classes. data.num_classes=null takes the number from the data."
        )
    return images


class Key(NamedTuple):
    """Which sample, and how often it was drawn before: all that its augmentation depends on beside the seed."""

    epoch: int
    index: int
    copy: int = 0


class Sample(NamedTuple):
    image: Tensor  # (3, H, W); batched (B, 3, H, W)
    target: int | Tensor
    index: int | Tensor


class Samples(Dataset[Sample]):
    """Transformed images by key, the same whatever the number of workers and devices."""

    def __init__(self, images: Images, transform: Transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: Key) -> Sample:
        seed_everything(self.seed, *key)
        try:
            image, target = self.images.load(key.index)
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on broken files
            raise DataError(f"{self.images.describe(key.index)} cannot be read as an image: {error}") from None
        return Sample(self.transform(image), target, key.index)


def seed_everything(*numbers: int) -> None:
    """Seed random, NumPy and torch by a tuple of whole numbers."""
    python, numpy, torch_seed = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(python))
    np.random.seed(int(numpy))
    # Not torch.manual_seed: without a GPU in use it queues a call and a stack trace for one, at every sample.
    torch.default_generator.manual_seed(int(torch_seed))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(torch_seed))


def epoch_order(length: int, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """Indices `(length,)` in the order of an epoch; with repeats, each image that many times in a row, and
    accordingly fewer images (repeated augmentation)."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
    return torch.randperm(length, generator=generator).repeat_interleave(repeats)[:length]


class MicroBatches:
    """The keys of one device's micro-batches, from optimizer step `start` to the end of training.

    A global batch is cut into `world * accumulation` micro-batches; device `rank` takes every `world`-th.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        accumulation: int,
        steps: int,
        seed: int,
        start: int = 0,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.length, self.batch_size, self.accumulation, self.steps = length, batch_size, accumulation, steps
        self.seed, self.start, self.repeats, self.rank, self.world = seed, start, repeats, rank, world
        self.micro = batch_size // (accumulation * world)

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = self.length // self.batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = epoch_order(self.length, self.seed, epoch, self.repeats)
            first = step % per_epoch * self.batch_size
            for turn in range(self.accumulation):
                begin = first + (turn * self.world + self.rank) * self.micro
                positions = range(begin, begin + self.micro)
                yield [Key(epoch, int(order[p]), p % self.repeats) for p in positions]


def train_loader(samples: Samples, batches: MicroBatches, workers: int, pin: bool) -> DataLoader[Sample]:
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=pin)


def eval_loader(
    samples: Samples, batch_size: int, workers: int, pin: bool, rank: int = 0, world: int = 1
) -> DataLoader[Sample]:
    """Every sample once: device `rank` takes every `world`-th, without padding."""
    keys = [Key(0, index) for index in range(rank, len(samples.images), world)]
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=pin)
