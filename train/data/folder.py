"""Images in folders, as torchvision's ImageFolder lists them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from train.data.images import Files, is_hidden
from train.jobs.errors import ConfigError, DataError


class _Listing(ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """As ImageFolder, without hidden files and folders (`is_hidden`)."""

    def __init__(self, root: str):
        super().__init__(root, is_valid_file=lambda path: _is_image(path[len(root) :]))

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not is_hidden(name)]
        if not classes:
            raise FileNotFoundError(f"{directory} has no folder of a class.")
        return classes, {name: number for number, name in enumerate(classes)}


def _is_image(path: str) -> bool:
    """Whether a file, by its path within the split, is an image that counts."""
    return path.lower().endswith(IMG_EXTENSIONS) and not any(map(is_hidden, path.split(os.sep)))


class Folder(Files):
    """Images at `root/split/<class>/*`; hidden files and folders do not count.

    Args:
        setting: the key that names the split, for messages.

    Raises:
        ConfigError: there is no such folder, or a class has no images.
    """

    def __init__(self, root: Path, split: str, setting: str):
        _check_folder(root, split, setting)
        try:
            listing = _Listing(str(root / split))
        except FileNotFoundError as error:
            raise ConfigError(
                f"data.root={str(root)!r}: {error} Images end with {', '.join(IMG_EXTENSIONS)}."
            ) from None
        self.classes = listing.classes
        # Arrays, whose memory forked processes share. They would copy lists, by counting references.
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


def _check_folder(root: Path, split: str, setting: str) -> None:
    if (root / split).is_dir():
        return
    if root.is_file():
        raise ConfigError(f"data.root={str(root)!r} is a file: data.format=tar reads a tar archive.")
    if not root.is_dir():
        raise ConfigError(f"data.root={str(root)!r} is not a folder.")
    there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:6])
    raise ConfigError(
        f"data.root={str(root)!r} has no folder {split!r} of classes with images; it has {there or 'no folders'}. "
        f"{setting}: a folder's name."
    )
