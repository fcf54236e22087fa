"""Data sets of images by index: digits, folders, tar archives, WebDataset shards, CIFAR-10 (cifar.py); parts of one."""

from __future__ import annotations

import glob
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.config import DataConfig
from train.data import cifar
from train.data.archives import index_archive, index_shards, read_at, split_of, stamp_of
from train.jobs.errors import ConfigError, DataError


class BrokenImage(DataError):
    """A file was read, and is no whole image."""


class Images(Protocol):
    """A data set: images by index, their targets `(N,)` and names. It may have an `order(seed, epoch)` of its own."""

    classes: list[str]
    targets: np.ndarray[Any, Any]

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


class Files(ABC):
    """Images in files: `read` gives the bytes of one, `targets` are `(N,)`."""

    classes: list[str]
    targets: np.ndarray[Any, Any]

    @abstractmethod
    def read(self, index: int) -> bytes: ...

    @abstractmethod
    def describe(self, index: int) -> str: ...

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
    """Images at `root/split/<class>/*`; `setting` is what names the split."""

    def __init__(self, root: Path, split: str, setting: str):
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
                f"{setting}: a folder's name."
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

    def __init__(self, path: Path, split: str, setting: str):
        if not path.is_file():
            what = "a folder: data.format=folder reads it" if path.is_dir() else "no file"
            raise ConfigError(f"data.root={str(path)!r} is {what}; data.format=tar reads a tar archive.")
        self.path, self.stamp = str(path), stamp_of(path)
        files, self.classes = split_of(path, index_archive(path), split, setting)
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
                f"data.train_split and data.eval_split are what their names begin with; scripts.data.shards makes some."
            )
        size = read_sizes(root).get(split)  # sets that others made do not tell
        check_size(root, split, "shards", size, len(shards))
        self.shards = [str(path) for path in shards]
        self.stamps = [stamp_of(path) for path in shards]
        index = index_shards(shards)
        self.keys, self.offsets, self.sizes = index["names"], index["offsets"], index["sizes"]  # (N,) each
        self.targets = index["targets"]
        if not len(self.targets):
            raise ConfigError(f"data.root={str(root)!r}: the shards {split}-*.tar have no samples.")
        check_size(root, split, "samples", size, len(self.targets))
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


class Part:
    """`count` images of a data set, at even distances within each class, so that classes keep their shares.

    Raises:
        ConfigError: there are fewer images.
    """

    def __init__(self, whole: Images, count: int, setting: str):
        if count > len(whole):
            raise ConfigError(f"{setting}={count}, but there are {len(whole)} images: lower it, or leave it out.")
        self.whole, self.classes = whole, whole.classes
        by_class = np.argsort(whole.targets, kind="stable")
        self.indices = np.sort(by_class[np.arange(count) * len(whole) // count])  # (count,)
        self.targets = whole.targets[self.indices]
        if hasattr(whole, "order"):
            self.order = self._order

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.whole.load(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.whole.describe(int(self.indices[index]))

    def _order(self, seed: int, epoch: int) -> Tensor:
        """Indices `(count,)` in the order that the whole has them in."""
        whole = self.whole.order(seed, epoch).numpy()  # type: ignore[attr-defined]
        return torch.from_numpy(np.searchsorted(self.indices, whole[np.isin(whole, self.indices)]))


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


SIZES = "shards.json"  # beside shards: {"train": {"shards": 2, "samples": 3000}, ...}


def read_sizes(root: Path) -> dict[str, dict[str, int]]:
    """How many shards and samples there are to be of each split, by shards.json; nothing without.

    Raises:
        DataError: it cannot be read.
    """
    path = root / SIZES
    if not path.exists():
        return {}
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
        return {split: {key: int(size[key]) for key in ("shards", "samples")} for split, size in sizes.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): make or copy it again.") from None


def check_size(root: Path, split: str, key: str, size: dict[str, int] | None, found: int) -> None:
    if size is not None and size[key] != found:
        raise DataError(
            f"data.root={str(root)!r} has {found} {key} of {split!r}; by its {SIZES} there are {size[key]}: copy "
            f"or make them again, or remove {SIZES} if what is there is all that is wanted."
        )


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


def open_split(config: DataConfig, split: str, setting: str = "data.train_split, data.eval_split") -> Images:
    """The images of one split, which was named by `setting`.

    Raises:
        ConfigError: it is not there, is empty, or has another number of classes than data.num_classes.
        DataError: an archive is damaged, or shards are missing.
    """
    images = _open_split(config, split, Path(config.root or "."), setting)
    if config.num_classes is not None and len(images.classes) != config.num_classes:
        raise ConfigError(
            f"data.num_classes={config.num_classes}, but {split!r} of data.root={config.root!r} "
            f"has {len(images.classes)} classes. data.num_classes=null takes the number from the data."
        )
    return images


def _open_split(config: DataConfig, split: str, root: Path, setting: str) -> Images:
    if config.format == "digits":
        return Digits(split)
    if config.format == "shards":
        return Shards(root, split, config.window, config.num_classes, (config.train_split, config.eval_split))
    if config.format == "cifar10" or (config.format == "auto" and cifar.is_here(root)):
        return cifar.Cifar10(root, split, setting)
    if config.format == "tar" or (config.format == "auto" and (root.is_file() or root.suffix == ".tar")):
        return Archive(root, split, setting)
    return Folder(root, split, setting)


def order_generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
