"""WebDataset shards: tar archives of samples, for data sets of many archives. `scripts.data.shards` makes some."""

from __future__ import annotations

import glob
import itertools
import json
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from train.data import tar
from train.data.images import Files
from train.data.order import order_generator
from train.jobs.errors import ConfigError, DataError

SIZES = "shards.json"  # next to the shards: {"train": {"shards": 2, "samples": 3000}, ...}


class Shards(Files):
    """The samples of shards, one shard after the other, by their index (`index_shards`). A subclass reads them.

    Args:
        root: where the shards are, for messages.
        names: of the shards.
        parts: what the order cuts an epoch into, so that ranks read different shards (see `order`).
        window: the number of shards of a part whose samples are shuffled together.

    Raises:
        ConfigError: there are no samples.
        DataError: a target has no class.
    """

    def __init__(
        self, root: str, names: list[str], index: tar.Arrays, classes: list[str], window: int = 8, parts: int = 1
    ):
        self.root, self.names, self.classes, self.window, self.parts = root, names, classes, window, parts
        self.keys, self.offsets, self.sizes = index["names"], index["offsets"], index["sizes"]  # (N,) each
        self.targets = index["targets"]
        self.starts = np.concatenate([[0], index["counts"].cumsum()])  # (shards + 1,)
        if not len(self.targets):
            raise ConfigError(f"data.root={root!r}: the {len(names)} shards from {names[0]} on have no samples.")
        if self.targets.max() >= len(classes):
            worst = int(self.targets.argmax())
            raise DataError(
                f"{self.describe(worst)} is of class {self.targets[worst]}, but there are {len(classes)} classes, by "
                f"the list of classes next to the shards or data.num_classes."
            )

    def shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def describe(self, index: int) -> str:
        return f"{self.root}/{self.names[self.shard_of(index)]}:{tar.name_of(self.keys[index])}"

    def order(self, seed: int, epoch: int) -> Tensor:
        """Shards in random order, cut into `parts` of equally many samples, and in each the samples of every `window`
        shards in random order. So a part is read a few shards at a time, and two parts share a shard at most."""
        generator = order_generator(seed, epoch)
        shards = torch.randperm(len(self.names), generator=generator).tolist()
        samples = torch.cat([torch.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        ends = np.cumsum([self.starts[s + 1] - self.starts[s] for s in shards])  # of the shards in `samples`
        size = len(samples) // self.parts
        windows = []
        for begin in range(0, size * self.parts, size or 1):
            inside = ends[(ends > begin) & (ends < begin + size)]  # where a shard ends and the next one begins
            cuts = [begin, *inside[self.window - 1 :: self.window].tolist(), begin + size]
            windows += [samples[first:last] for first, last in itertools.pairwise(cuts)]
        windows.append(samples[size * self.parts :])  # fewer than `parts`
        return torch.cat([near[torch.randperm(len(near), generator=generator)] for near in windows])


class LocalShards(Shards):
    """Shards `root/split-*.tar` of images and `.cls`, with the names of the classes in `root/classes.txt` (a line each)
    or `classes.json`. Without these files, classes are called by their numbers.

    Args:
        splits: all splits of the data set, which together decide how many unnamed classes there are.

    Raises:
        ConfigError: there are no shards, a number is missing among them, or they have no samples.
        DataError: a shard is damaged, samples are missing, or a target has no class.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        window: int,
        num_classes: int | None,
        splits: Iterable[str] = (),
        parts: int = 1,
    ):
        shards = list_shards(root, split)
        if not shards:
            there = ", ".join(sorted(path.name for path in root.glob("*.tar"))[:6])
            raise ConfigError(
                f"data.root={str(root)!r} has no shards {split}-*.tar; it has {there or 'no tar archives'}. "
                f"data.train_split and data.eval_split are what their names begin with; scripts.data.shards makes some."
            )
        size = read_sizes(root).get(split)
        _check_size(root, split, "shards", size, len(shards))
        self.paths = [str(path) for path in shards]
        self.stamps = [tar.stamp_of(path) for path in shards]
        index = index_shards(shards)
        if len(index["targets"]):
            _check_size(root, split, "samples", size, len(index["targets"]))
        classes = class_names(root, {split, *splits}, num_classes)
        super().__init__(str(root), [path.name for path in shards], index, classes, window, parts)

    def read(self, index: int) -> bytes:
        shard = self.shard_of(index)
        return tar.read_at(self.paths[shard], self.stamps[shard], int(self.offsets[index]), int(self.sizes[index]))


# ---- samples --------------------------------------------------------------------------------------------------------


def list_shards(root: Path, split: str) -> list[Path]:
    """The paths of a split's shards, in the order of their names.

    Raises:
        ConfigError: a number is missing among them.
    """
    paths = sorted(root.glob(f"{glob.escape(split)}-*.tar"))
    numbers = sorted(int(number[1]) for path in paths if (number := re.search(r"(\d+)\.tar$", path.name)))
    missing = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers)) if numbers else []
    if missing:
        raise ConfigError(
            f"{root} has shards up to {paths[-1].name}, but none of number {missing[0]}: "
            f"copy it there, or renumber them."
        )
    return paths


def index_shards(paths: list[Path]) -> tar.Arrays:
    """The samples of shards, one shard after the other: `names` (N,), their keys in bytes; `offsets` (N,) and `sizes`
    (N,) of the images, `targets` (N,), and `counts` (shards,) of samples. From the cache if it is there."""

    return tar.cached(paths, lambda: index_of([shard_samples(path) for path in paths]))


def index_of(shards: list[list[ShardSample]]) -> tar.Arrays:
    """The arrays of `index_shards`, of the samples of each shard."""
    samples = [sample for shard in shards for sample in shard]
    return {
        "names": tar.names_array([sample.key for sample in samples]),
        "counts": tar.numbers_array([len(shard) for shard in shards]),
        "offsets": tar.numbers_array([sample.offset for sample in samples]),
        "sizes": tar.numbers_array([sample.size for sample in samples]),
        "targets": tar.numbers_array([sample.target for sample in samples]),
    }


class ShardSample(NamedTuple):
    key: str
    offset: int  # of the image's bytes
    size: int
    target: int


def shard_samples(path: Path) -> list[ShardSample]:
    """The samples of one shard, of which there may be none.

    Raises:
        DataError: naming shard and key, a sample has not exactly one image and one whole number in `.cls`.
    """
    stamp = tar.stamp_of(path)
    samples = []
    for key, parts in _files_by_key(path).items():
        images = [ending for ending in parts if f".{ending}" in IMG_EXTENSIONS]
        if not images and "cls" not in parts:
            continue  # not a sample: a note, or the like
        if len(images) != 1 or "cls" not in parts:
            has = ", ".join(f".{ending}" for ending in parts)
            raise DataError(f"{path}: sample {key!r} has {has}; it needs one image and .cls, the number of its class.")
        text = tar.read_at(str(path), stamp, parts["cls"].offset, parts["cls"].size)
        if not text.strip().isdigit():
            raise DataError(f"{path}: {key}.cls has {text[:20]!r}; it needs the number of a class, from 0 up.")
        samples.append(ShardSample(key, parts[images[0]].offset, parts[images[0]].size, int(text)))
    return samples


def _files_by_key(path: Path) -> dict[str, dict[str, tar.Member]]:
    """`{key: {ending: file}}`. As in webdataset, a key goes up to the first dot of the file's name."""
    found: dict[str, dict[str, tar.Member]] = {}
    for member in tar.members(path):
        folder, file = posixpath.split(member.name)
        stem, dot, ending = file.partition(".")
        if member.size == tar.FOLDER or not stem or not dot:
            continue
        parts = found.setdefault(posixpath.join(folder, stem), {})
        if ending.lower() in parts:
            raise DataError(f"{path}: {member.name!r} is there twice; each sample needs a key that no other has.")
        parts[ending.lower()] = member
    return found


# ---- what lies next to the shards -----------------------------------------------------------------------------------


def read_sizes(root: Path) -> dict[str, dict[str, int]]:
    """The numbers of shards and samples that each split should have, by shards.json; empty without that file.

    Raises:
        DataError: it cannot be read.
    """
    path = root / SIZES
    if not path.exists():  # not every program that makes shards writes it
        return {}
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
        return {split: {key: int(size[key]) for key in ("shards", "samples")} for split, size in sizes.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): make or copy it again.") from None


def _check_size(root: Path, split: str, key: str, size: dict[str, int] | None, found: int) -> None:
    if size is not None and size[key] != found:
        raise DataError(
            f"data.root={str(root)!r} has {found} {key} of {split!r}; by its {SIZES} there are {size[key]}: copy "
            f"or make them again, or remove {SIZES} if what is there is all that is wanted."
        )


def read_classes(root: Path) -> list[str]:
    """The names of the classes, by classes.txt or classes.json; empty without these files."""
    text, listed = root / "classes.txt", root / "classes.json"
    if text.exists():
        return [line.rstrip("\r") for line in text.read_text(encoding="utf-8").rstrip("\r\n").split("\n")]
    if not listed.exists():
        return []
    try:
        names = json.loads(listed.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{listed} is not JSON: {error}.") from None
    if isinstance(names, dict) and sorted(map(str, names.values())) == sorted(map(str, range(len(names)))):
        names = sorted(names, key=lambda name: int(names[name]))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f'{listed} must be a list of names, ["cat", "dog"], or have their numbers, {{"cat": 0, "dog": 1}}.'
        )
    return names


def class_names(root: Path, splits: set[str], num_classes: int | None = None) -> list[str]:
    """The names of the classes, or their numbers where they have none: up to `num_classes`, or else up to the greatest
    target of any split, so that splits agree."""
    if named := read_classes(root):
        return named
    if num_classes is None:
        found = [index_shards(shards)["targets"] for name in splits if (shards := list_shards(root, name))]
        num_classes = 1 + max(int(targets.max(initial=0)) for targets in found)
    return [str(number) for number in range(num_classes)]
