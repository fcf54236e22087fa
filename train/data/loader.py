"""The order and augmentation of samples as functions of (seed, epoch, index), and how they are loaded."""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.data.images import BrokenImage, Images, order_generator
from train.data.transforms import Transform
from train.jobs.errors import DataError, writing
from train.jobs.folder import write_whole

Order = Callable[[int, int], Tensor]  # (seed, epoch) -> indices `(N,)`


class Key(NamedTuple):
    """Which sample, and how often it was drawn before: all that its augmentation depends on beside the seed."""

    epoch: int
    index: int
    copy: int = 0


class Sample(NamedTuple):
    image: Tensor  # (3, H, W); batched (B, 3, H, W)
    target: int | Tensor
    index: int | Tensor


class Drawn(NamedTuple):
    """A sample with the key it was drawn by, and the index of the image it has: another where that one is broken."""

    image: Tensor  # (3, H, W); batched (B, 3, H, W)
    target: int | Tensor
    index: int | Tensor
    epoch: int | Tensor
    copy: int | Tensor
    used: int | Tensor


class Samples(Dataset[Drawn]):
    """Transformed images by key, the same whatever the number of workers and devices.

    With `substitute`, the image next in the data set that can be read takes the place of a broken one.
    """

    MOST_BROKEN = 100  # in a row

    def __init__(self, images: Images, transform: Transform, seed: int, substitute: bool = False):
        self.images, self.transform, self.seed, self.substitute = images, transform, seed, substitute

    @property
    def order(self) -> Order | None:
        """That of an epoch, where the data set has one of its own."""
        return getattr(self.images, "order", None)

    def __getitem__(self, key: Key) -> Drawn:
        image, target, used = self._load(key.index)
        seed_everything(self.seed, *key)
        return Drawn(self.transform(image), target, key.index, key.epoch, key.copy, used)

    def _load(self, index: int) -> tuple[Image.Image, int, int]:
        """Image and target, and the index they are of."""
        length = len(self.images)
        tries = min(self.MOST_BROKEN, length) if self.substitute else 1
        broken = []
        for used in (number % length for number in range(index, index + tries)):
            try:
                return *self.images.load(used), used
            except BrokenImage as error:
                broken.append(error)
        if self.substitute:
            raise DataError(f"{tries} images in a row are broken, the first of them: {broken[0]}")
        raise broken[0]


def seed_everything(*numbers: int) -> None:
    """Seed random, NumPy and torch by a tuple of whole numbers."""
    # A hash, not np.random.SeedSequence: that takes five times as long, a few percent of reading a small image.
    python, numpy, torch_seed = struct.unpack("<3I", hashlib.blake2b(repr(numbers).encode(), digest_size=12).digest())
    random.seed(python)
    np.random.seed(numpy)
    # Not torch.manual_seed: without a GPU in use it queues a call and a stack trace for one, at every sample.
    torch.default_generator.manual_seed(torch_seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(torch_seed)


def epoch_order(length: int, seed: int, epoch: int, repeats: int = 1, order: Order | None = None) -> Tensor:
    """Indices `(length,)` in the order of an epoch, the data set's own or a random one; with repeats, each image that
    many times in a row, and accordingly fewer images (repeated augmentation)."""
    indices = order(seed, epoch) if order else torch.randperm(length, generator=order_generator(seed, epoch))
    return indices.repeat_interleave(repeats)[:length]


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
        order: Order | None = None,
    ):
        self.order = order
        self.length, self.batch_size, self.accumulation, self.steps = length, batch_size, accumulation, steps
        self.seed, self.start, self.repeats, self.rank, self.world = seed, start, repeats, rank, world
        self.micro = batch_size // (accumulation * world)

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = self.length // self.batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = epoch_order(self.length, self.seed, epoch, self.repeats, self.order)
            first = step % per_epoch * self.batch_size
            for turn in range(self.accumulation):
                begin = first + (turn * self.world + self.rank) * self.micro
                positions = range(begin, begin + self.micro)
                yield [Key(epoch, int(order[p]), p % self.repeats) for p in positions]


class Substitutes:
    """The broken training images that others took the place of, in a run folder's `substituted.txt`: a line for each
    time, `epoch, index, copy, file, file in its place`.

    They are on disk before the step that uses them, in a file of each process, and the same ones are counted once: so
    the list is exact also after a run was killed and repeats some steps.
    """

    def __init__(self, folder: Path, images: Images, rank: int = 0):
        self.images, self.rank = images, rank
        self.whole, self.parts = folder / "substituted.txt", folder / "substituted"

    def record(self, batch: Drawn) -> None:
        columns = (torch.as_tensor(column).tolist() for column in (batch.epoch, batch.index, batch.copy, batch.used))
        lines = [self._line(*row) for row in zip(*columns, strict=True) if row[1] != row[3]]
        if not lines:
            return
        part = self.parts / f"{self.rank}.txt"
        with writing(part):
            self.parts.mkdir(parents=True, exist_ok=True)
            with part.open("a", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())

    def _line(self, epoch: int, index: int, copy: int, used: int) -> str:
        names = (printable(self.images.describe(i)) for i in (index, used))
        return "\t".join((str(epoch), str(index), str(copy), *names)) + "\n"

    def count(self, epoch: int) -> int:
        """How many there were in an epoch, once all processes are through with it; the main one then writes the list
        of all so far."""
        lines: set[str] = set()
        for part in self.parts.glob("*.txt"):
            lines |= {line for line in part.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")}
        if lines and self.rank == 0:
            write_whole(self.whole, "".join(sorted(lines, key=lambda line: [int(x) for x in line.split("\t")[:3]])))
        return sum(line.startswith(f"{epoch}\t") for line in lines)


def identity(images: Images, most: int = 10_000) -> dict[str, Any]:
    """What tells a data set from others, wherever it lies: how many images it has, and a digest of their names, or of
    `most` names at even distances. A name goes from the last "/" on, so that no path of the place is in it."""
    digest = hashlib.blake2b(digest_size=16)
    for index in range(0, len(images), math.ceil(len(images) / most) or 1):
        digest.update(images.describe(index).rpartition("/")[2].encode("utf-8", "surrogateescape") + b"\0")
    return {"images": len(images), "names": digest.hexdigest()}


def printable(name: str) -> str:
    """A name on one line: what cannot be printed as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


class Loader:
    """A DataLoader's batches as samples; what was substituted in a batch is recorded when it is used."""

    def __init__(self, drawn: DataLoader[Drawn], substitutes: Substitutes | None = None):
        self.drawn, self.substitutes = drawn, substitutes

    def __len__(self) -> int:
        return len(self.drawn)

    def __iter__(self) -> Iterator[Sample]:
        try:
            for batch in self.drawn:
                if self.substitutes:
                    self.substitutes.record(batch)
                yield Sample(batch.image, batch.target, batch.index)
            return
        except DataError as error:
            message = without_trace(str(error))
            error.__traceback__ = None  # it has the workers' handles in a cycle, whose collection waits 5 s for each
        raise DataError(message)


def without_trace(message: str) -> str:
    """A worker's error comes with its stack trace, which would bury what it says."""
    said = re.search(r"^[\w.]*(?:DataError|BrokenImage): (.*)", message, re.MULTILINE | re.DOTALL)
    return said[1].strip() if message.startswith("Caught ") and said else message


def train_loader(
    samples: Samples, batches: MicroBatches, workers: int, pin: bool, substitutes: Substitutes | None = None
) -> Loader:
    drawn = DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=pin)
    return Loader(drawn, substitutes)


def eval_loader(samples: Samples, batch_size: int, workers: int, pin: bool, rank: int = 0, world: int = 1) -> Loader:
    """Every sample once: device `rank` takes every `world`-th, without padding."""
    keys = [Key(0, index) for index in range(rank, len(samples.images), world)]
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return Loader(DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=pin))
