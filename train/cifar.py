"""CIFAR-10 as it is published and as torchvision keeps it: ten thousand images a file, in `cifar-10-batches-py`.

torchvision's own reader is not used: it unpickles whatever the files have in them, and refuses those whose checksum is
not the published one, such as a part of the data set. They hold names, numbers and bytes; nothing else is made here.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.errors import ConfigError, DataError

FOLDER = "cifar-10-batches-py"
META = "batches.meta"
SPLITS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
SIDE = 32
# What pickles of arrays name, by the numpy that wrote them.
ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
for _core in ("core", "_core"):
    ALLOWED |= {(f"numpy.{_core}.multiarray", "_reconstruct"), (f"numpy.{_core}.numeric", "_frombuffer")}


class Cifar10:
    """The images of `root/cifar-10-batches-py`, or of `root` if that is the folder itself.

    Raises:
        ConfigError: there is no such split, or no file of it.
        DataError: a file is damaged.
    """

    def __init__(self, root: Path, split: str, setting: str):
        if split not in SPLITS:
            raise ConfigError(f"CIFAR-10 has no split {split!r}; {setting}: {' or '.join(SPLITS)}.")
        folder = find(root)
        if folder is None:
            archive = next(iter(sorted(root.glob("cifar-10-*.tar.gz"))), None)
            remedy = f"`tar -xzf {archive} -C {root}` unpacks it there" if archive else "data.root=PATH of what has it"
            raise ConfigError(f"data.root={str(root)!r} has no folder {FOLDER}: {remedy}.")
        self.paths = [folder / name for name in SPLITS[split]]
        missing = [path.name for path in self.paths if not path.is_file()]
        if missing:
            raise ConfigError(f"{folder} has no file {missing[0]}: copy or unpack it again.")
        self.classes = _read_classes(folder)
        batches = [_read_batch(path, len(self.classes)) for path in self.paths]
        self.pixels = np.concatenate([pixels for pixels, *_ in batches])  # (N, 3, 32, 32)
        self.targets = np.concatenate([targets for _, targets, _ in batches])  # (N,)
        self.names = np.concatenate([names for *_, names in batches])  # (N,) in bytes

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index].transpose(1, 2, 0)), int(self.targets[index])

    def describe(self, index: int) -> str:
        return f"{self.paths[0].parent}/{self.names[index].decode('utf-8', 'surrogateescape')}"


def find(root: Path) -> Path | None:
    """The folder with the batches: `root/cifar-10-batches-py`, or `root` itself."""
    for folder in (root / FOLDER, root):
        if any((folder / name).is_file() for names in SPLITS.values() for name in names):
            return folder
    return None


class _Unpickler(pickle.Unpickler):
    """Makes arrays, and refuses to call or make anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which the data set has no use for")
        return super().find_class(module, name)


def _read(path: Path) -> dict[str, Any]:
    """The dictionary in a file; its keys as text, which Python 2 wrote as bytes."""
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} is no whole file of CIFAR-10 ({error}): copy or unpack it again.") from None


def _read_classes(folder: Path) -> list[str]:
    names = _read(folder / META).get("label_names")
    if not isinstance(names, list) or not names:
        raise DataError(f"{folder / META} has no list label_names: copy or unpack it again.")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _read_batch(path: Path, classes: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Pixels `(N, 3, 32, 32)`, targets `(N,)` and names `(N,)` in bytes."""
    content = _read(path)
    try:
        pixels = np.asarray(content["data"], np.uint8).reshape(-1, 3, SIDE, SIDE)
        targets = np.asarray(content["labels"], np.int64)
        names = content.get("filenames") or [f"{path.name}_{index:05d}" for index in range(len(targets))]
        encoded = [name if isinstance(name, bytes) else name.encode() for name in names]
        if not len(pixels) == len(targets) == len(encoded):
            raise ValueError(f"{len(pixels)} images, {len(targets)} labels and {len(encoded)} names")
        if not ((targets >= 0) & (targets < classes)).all():
            raise ValueError(f"a label that is none of {classes}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no whole file of CIFAR-10 ({error}): copy or unpack it again.") from None
    return pixels, targets, np.array(encoded, dtype=bytes)
