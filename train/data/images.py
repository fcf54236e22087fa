"""A data set, as every format presents it: images by index. And a part of a data set."""

from __future__ import annotations

import hashlib
import io
import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.jobs.errors import ConfigError, DataError

Array = np.ndarray[Any, Any]


# What file managers, notebooks and network disks add to folders.
ADDED = ("@eaDir", "#recycle", "__MACOSX", "lost+found")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not part of a data set: `.ipynb_checkpoints`, `.git`, `._1.jpg`,
    `@eaDir`."""
    return name.startswith(".") or name in ADDED


class BrokenImage(DataError):
    """A file was read, but is not a complete image."""


class Images(ABC):
    """Images by index, with the names of their classes and their targets `(N,)`."""

    classes: list[str]
    targets: Array
    parts: int = 1  # of the order, from each of which a batch takes as many samples
    ahead: int = 0  # for how many samples ahead `fetch` should be called; 0: it does nothing

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """An RGB image and its target.

        Raises:
            BrokenImage: its file is not a complete image.
            DataError: its file cannot be read.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where an image is, for messages. What follows the last "/" also identifies the data set (`identity`)."""

    def order(self, seed: int, epoch: int) -> Tensor | None:
        """Indices `(N,)` in the order in which an epoch reads them; None for a random permutation."""
        return None

    def source(self, index: int) -> int:
        """What `fetch` makes ready for the sample."""
        return index

    def fetch(self, source: int) -> None:  # noqa: B027  # most have nothing to do
        """Make ready, in a thread, what samples will be read from.

        Raises:
            DataError: it cannot be read.
        """


class Files(Images):
    """Images in files: a subclass reads the bytes, and this decodes them."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of one file.

        Raises:
            DataError: it cannot be read.
        """

    def load(self, index: int) -> tuple[Image.Image, int]:
        file = io.BytesIO(self.read(index))
        try:
            image: Image.Image = Image.open(file)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB"), int(self.targets[index])
        except MemoryError:  # not the file's fault
            raise
        except Exception as error:  # decoders raise nearly anything on broken files
            raise BrokenImage(f"{self.describe(index)} cannot be read as an image: {error}") from None


class Part(Images):
    """`count` images of a data set, at even distances within each class, so that classes keep their shares.

    Raises:
        ConfigError: the data set has fewer images.
    """

    def __init__(self, images: Images, count: int, setting: str):
        if count > len(images):
            raise ConfigError(f"{setting}={count}, but there are {len(images)} images: lower it, or leave it out.")
        self.images, self.classes = images, images.classes
        by_class = np.argsort(images.targets, kind="stable")
        self.indices = np.sort(by_class[np.arange(count) * len(images) // count])  # (count,)
        self.targets = images.targets[self.indices]
        self.parts, self.ahead = images.parts, images.ahead

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.images.load(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.images.describe(int(self.indices[index]))

    def source(self, index: int) -> int:
        return self.images.source(int(self.indices[index]))

    def fetch(self, source: int) -> None:
        self.images.fetch(source)

    def order(self, seed: int, epoch: int) -> Tensor | None:
        order = self.images.order(seed, epoch)
        if order is None:
            return None
        kept = order.numpy()[np.isin(order.numpy(), self.indices)]
        return torch.from_numpy(np.searchsorted(self.indices, kept))


def identity(images: Images, most: int = 10_000) -> dict[str, Any]:
    """What a resumed run recognizes its data by: the number of images and a digest of their names, without folders, so
    that data may be moved. Of a large data set, `most` names at even distances."""
    digest = hashlib.blake2b(digest_size=16)
    for index in range(0, len(images), math.ceil(len(images) / most) or 1):
        digest.update(images.describe(index).rpartition("/")[2].encode("utf-8", "surrogateescape") + b"\0")
    return {"images": len(images), "names": digest.hexdigest()}
