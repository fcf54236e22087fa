"""Data sets of images, and the order and augmentation of their samples as functions of (seed, epoch, index)."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import random
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.archives import index_archive, index_shards, read_at, split_of, stamp_of
from train.config import DataConfig
from train.errors import ConfigError, DataError
from train.logging import write_whole
from train.transforms import Transform

Order = Callable[[int, int], Tensor]  # (seed, epoch) -> indices `(N,)`


class BrokenImage(DataError):
    """A file was read, and is no whole image."""


class Images(Protocol):
    """A data set: images by index, their targets and names. It may have an `order(seed, epoch)` of its own."""

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


class Files:
    """Images in files: `read` gives the bytes of one, `targets` are `(N,)`."""

    classes: list[str]
    targets: np.ndarray[Any, Any]

    def read(self, index: int) -> bytes:
        raise NotImplementedError

    def describe(self, index: int) -> str:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        file = io.BytesIO(self.read(index))
        try:
            image: Image.Image = Image.open(file)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB"), int(self.targets[index])
        except MemoryError:  # says nothing about the file
            raise
        except Exception as error:  # decoders raise nearly anything on broken files
            raise BrokenImage(f"{self.describe(index)} cannot be read as an image: {error}") from None


class Folder(Files):
    """Images at `root/split/<class>/*`."""

    def __init__(self, root: Path, split: str):
        from torchvision.datasets import ImageFolder

        folder = root / split
        if not folder.is_dir():
            if root.is_file():
                raise ConfigError(f"data.root={str(root)!r} is a file: data.format=tar reads a tar archive.")
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
        self.classes = listing.classes
        # Arrays, which processes share when they fork, unlike lists.
        self.paths = np.array([os.fsencode(path) for path, _ in listing.samples])  # (N,)
        self.targets = np.array(listing.targets)

    def read(self, index: int) -> bytes:
        try:
            with open(self.paths[index], "rb", buffering=0) as file:
                return file.readall()
        except OSError as error:
            raise DataError(f"{self.describe(index)} cannot be read: {error.strerror}.") from None

    def describe(self, index: int) -> str:
        return os.fsdecode(self.paths[index])


class Archive(Files):
    """Images at `split/<class>/*` in a tar archive, in the order of a folder with the same files."""

    def __init__(self, path: Path, split: str):
        if not path.is_file():
            what = "a folder: data.format=folder reads it" if path.is_dir() else "no file"
            raise ConfigError(f"data.root={str(path)!r} is {what}; data.format=tar reads a tar archive.")
        self.path, self.stamp = str(path), stamp_of(path)
        files, self.classes = split_of(path, index_archive(path), split)
        self.names, self.offsets, self.sizes = files["names"], files["offsets"], files["sizes"]  # (N,) each
        self.targets = files["targets"]

    def read(self, index: int) -> bytes:
        return read_at(self.path, self.stamp, int(self.offsets[index]), int(self.sizes[index]))

    def describe(self, index: int) -> str:
        return f"{self.path}:{self.names[index].decode('utf-8', 'surrogateescape')}"


class Shards(Files):
    """WebDataset shards `root/split-*.tar` of images and `.cls`, and the names of the classes in `root/classes.txt` (a
    line each) or `classes.json`; without, classes are called by their numbers."""

    def __init__(self, root: Path, split: str, window: int, num_classes: int | None, splits: Iterable[str] = ()):
        self.window = window
        shards = list_shards(root, split)
        if not shards:
            there = ", ".join(sorted(path.name for path in root.glob("*.tar"))[:6])
            raise ConfigError(
                f"data.root={str(root)!r} has no shards {split}-*.tar; it has {there or 'no tar archives'}. "
                f"data.train_split and data.eval_split are what their names begin with; scripts.make_shards makes some."
            )
        self.shards = [str(path) for path in shards]
        self.stamps = [stamp_of(path) for path in shards]
        index = index_shards(shards)
        self.keys, self.offsets, self.sizes = index["names"], index["offsets"], index["sizes"]  # (N,) each
        self.targets = index["targets"]
        if not len(self.targets):
            raise ConfigError(f"data.root={str(root)!r}: the shards {split}-*.tar have no samples.")
        self.starts = np.concatenate([[0], index["counts"].cumsum()])  # (shards + 1,)
        named = read_classes(root)
        self.classes = named or [str(number) for number in range(num_classes or self._count(root, {split, *splits}))]
        if self.targets.max() >= len(self.classes):
            worst = int(self.targets.argmax())
            raise DataError(
                f"{self.describe(worst)} is of class {self.targets[worst]}, but there are {len(self.classes)} classes, "
                f"by {'the list of classes beside the shards' if named else 'data.num_classes'}."
            )

    def _count(self, root: Path, splits: set[str]) -> int:
        """Classes without names: as many as the greatest number in any split asks for, so that splits agree."""
        found = [index_shards(shards)["targets"] for name in splits if (shards := list_shards(root, name))]
        return 1 + max(int(targets.max(initial=0)) for targets in found)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def read(self, index: int) -> bytes:
        shard = self._shard(index)
        return read_at(self.shards[shard], self.stamps[shard], int(self.offsets[index]), int(self.sizes[index]))

    def describe(self, index: int) -> str:
        return f"{self.shards[self._shard(index)]}:{self.keys[index].decode('utf-8', 'surrogateescape')}"

    def order(self, seed: int, epoch: int) -> Tensor:
        """Indices `(N,)` of an epoch: shards in random order, and the samples of each few of them in random order, so
        that whatever the number of processes, they all read in the same few shards at a time."""
        generator = order_generator(seed, epoch)
        windows = []
        for shards in torch.randperm(len(self.shards), generator=generator).split(self.window):
            near = torch.cat([torch.arange(self.starts[s], self.starts[s + 1]) for s in shards.tolist()])
            windows.append(near[torch.randperm(len(near), generator=generator)])
        return torch.cat(windows)


def list_shards(root: Path, split: str) -> list[Path]:
    """Paths by name.

    Raises:
        ConfigError: some are missing, by their numbers.
    """
    paths = sorted(root.glob(f"{glob.escape(split)}-*.tar"))
    numbers = sorted(int(number[1]) for path in paths if (number := re.search(r"(\d+)\.tar$", path.name)))
    missing = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers)) if numbers else []
    if missing:
        raise ConfigError(
            f"{root} has shards up to {paths[-1].name}, but none of number {missing[0]}: "
            f"copy it there, or number them anew."
        )
    return paths


def read_classes(root: Path) -> list[str]:
    """Names of classes beside shards; none if there is no list."""
    text, listed = root / "classes.txt", root / "classes.json"
    if text.exists():
        return [line.rstrip("\r") for line in text.read_text(encoding="utf-8").rstrip("\r\n").split("\n")]
    if not listed.exists():
        return []
    try:
        names = json.loads(listed.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{listed} is no JSON: {error}.") from None
    if isinstance(names, dict) and sorted(map(str, names.values())) == sorted(map(str, range(len(names)))):
        names = sorted(names, key=lambda name: int(names[name]))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f'{listed} must be a list of names, ["cat", "dog"], or have their numbers, {{"cat": 0, "dog": 1}}.'
        )
    return names


def open_split(config: DataConfig, split: str) -> Images:
    """The images of one split.

    Raises:
        ConfigError: it is not there, is empty, or has another number of classes than data.num_classes.
        DataError: an archive is damaged.
    """
    images = _open_split(config, split, Path(config.root or "."))
    if config.num_classes is not None and len(images.classes) != config.num_classes:
        raise ConfigError(
            f"data.num_classes={config.num_classes}, but {split!r} of data.root={config.root!r} "
            f"has {len(images.classes)} classes. data.num_classes=null takes the number from the data."
        )
    return images


def _open_split(config: DataConfig, split: str, root: Path) -> Images:
    if config.format == "digits":
        return Digits(split)
    if config.format == "shards":
        return Shards(root, split, config.window, config.num_classes, (config.train_split, config.eval_split))
    if config.format == "tar" or (config.format == "auto" and (root.is_file() or root.suffix == ".tar")):
        return Archive(root, split)
    return Folder(root, split)


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


def order_generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))


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
        self.parts.mkdir(parents=True, exist_ok=True)
        with open(self.parts / f"{self.rank}.txt", "a", encoding="utf-8") as file:
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
