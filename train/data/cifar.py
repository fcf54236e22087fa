"""CIFAR-10 as published, and as torchvision keeps it: pickles of ten thousand images in `cifar-10-batches-py`.

A pickle can run any code. So a file is unpickled only if its MD5 sum is the published one, from torchvision's table.
torchvision's own reader checks the same, but drops the names of the images, by which a resumed run recognizes its data.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from train.data.images import Images
from train.jobs.errors import ConfigError, DataError

FOLDER, ARCHIVE, META = CIFAR10.base_folder, CIFAR10.filename, CIFAR10.meta["filename"]
SPLITS = {"train": [name for name, _ in CIFAR10.train_list], "test": [name for name, _ in CIFAR10.test_list]}
MD5 = {META: CIFAR10.meta["md5"], **dict(CIFAR10.train_list), **dict(CIFAR10.test_list)}  # by the file's name


class Cifar10(Images):
    """The images of `root/cifar-10-batches-py`, or of `root` if that is the folder itself.

    Raises:
        ConfigError: there is no such split, or a file is missing.
        DataError: a file is not the published one.
    """

    def __init__(self, root: Path, split: str, setting: str):
        if split not in SPLITS:
            raise ConfigError(f"CIFAR-10 has no split {split!r}; {setting}: {' or '.join(SPLITS)}.")
        self.folder = _folder(root)
        self.classes = _unpickle(self.folder / META)["label_names"]
        batches = [_unpickle(self.folder / name) for name in SPLITS[split]]
        self.pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        self.targets = np.concatenate([np.array(batch["labels"]) for batch in batches])
        self.names = np.concatenate([np.array(batch["filenames"]) for batch in batches])  # (N,)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index].transpose(1, 2, 0)), int(self.targets[index])

    def describe(self, index: int) -> str:
        return f"{self.folder}/{self.names[index]}"


def has_cifar10(root: Path) -> bool:
    """Whether `root` has CIFAR-10, in its folder or still in the archive that is downloaded."""
    return _unpacked(root) is not None or _packed(root) is not None


def _unpacked(root: Path) -> Path | None:
    return next((folder for folder in (root / FOLDER, root) if any((folder / name).is_file() for name in MD5)), None)


def _packed(root: Path) -> Path | None:
    return next((path for path in (root, root / ARCHIVE) if path.name == ARCHIVE and path.is_file()), None)


def _folder(root: Path) -> Path:
    if found := _unpacked(root):
        return found
    if archive := _packed(root):
        raise ConfigError(
            f"{archive} must be unpacked first: `tar -xzf {archive} -C {archive.parent}`, then "
            f"data.root={archive.parent}."
        )
    raise ConfigError(f"data.root={str(root)!r} has no folder {FOLDER} with CIFAR-10 in it.")


def _unpickle(path: Path) -> dict[str, Any]:
    """What a published file holds, once its MD5 sum is checked."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no file {path.name}: copy or unpack it again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != MD5[path.name]:
        raise DataError(
            f"{path} is not CIFAR-10's file as published (its MD5 sum is {found}, not {MD5[path.name]}), and was not "
            f"unpickled: copy or unpack it again. Other images are read from folders or a tar archive."
        )
    entries: dict[str, Any] = pickle.loads(content, encoding="latin1")  # Python 2 wrote them
    return entries
