"""CIFAR-10 as it is published and as torchvision keeps it: pickles of ten thousand images in `cifar-10-batches-py`.

torchvision's own reader is not used: it unpickles whatever the files have in them, and refuses those whose checksum is
not the published one, such as a part of the data set. What the files hold is names, numbers and bytes, and nothing else
is made of them here: where a pickle asks for an array, it gets one of bytes, or none.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.jobs.errors import ConfigError, DataError

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
META = "batches.meta"
SPLITS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
SIDE = 32


class Cifar10:
    """The images of `root/cifar-10-batches-py`, or of `root` if that is the folder itself.

    Raises:
        ConfigError: there is no such split, or no file of it.
        DataError: a file is damaged.
    """

    def __init__(self, root: Path, split: str, setting: str):
        if split not in SPLITS:
            raise ConfigError(f"CIFAR-10 has no split {split!r}; {setting}: {' or '.join(SPLITS)}.")
        folder = _folder(root)
        self.paths = [folder / name for name in SPLITS[split]]
        missing = [path.name for path in (folder / META, *self.paths) if not path.is_file()]
        if missing:
            raise ConfigError(f"{folder} has no file {missing[0]}: copy or unpack it again.")
        self.classes = _read_classes(folder / META)
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


def is_here(root: Path) -> bool:
    """Whether `root` has it, in its folder or still in the archive that is downloaded."""
    return _batches(root) is not None or _archive(root) is not None


def _batches(root: Path) -> Path | None:
    names = [name for split in SPLITS.values() for name in split]
    return next((folder for folder in (root / FOLDER, root) if any((folder / name).is_file() for name in names)), None)


def _archive(root: Path) -> Path | None:
    return next((path for path in (root, root / ARCHIVE) if path.name == ARCHIVE and path.is_file()), None)


def _folder(root: Path) -> Path:
    if found := _batches(root):
        return found
    if archive := _archive(root):
        raise ConfigError(
            f"{archive} is to be unpacked first: `tar -xzf {archive} -C {archive.parent}`, then "
            f"data.root={archive.parent}."
        )
    raise ConfigError(f"data.root={str(root)!r} has no folder {FOLDER} with CIFAR-10 in it.")


# ---- pickles --------------------------------------------------------------------------------------------------------


class _Array:
    """In place of an array: one of bytes, or an error. numpy's own would take any type and any memory."""

    def __init__(self, *ignored: Any):
        self.values: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, _, by_columns, raw = state
        if not isinstance(raw, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array without its bytes")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Type:
    """In place of an array's type."""

    def __init__(self, code: Any, *ignored: Any):
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}, where bytes are wanted")

    def __setstate__(self, state: Any) -> None:
        pass


def _from_buffer(raw: Any, type_: Any, shape: Any, order: str) -> _Array:
    """What protocol 5 has for an array."""
    made = _Array()
    made.__setstate__((1, shape, type_, order != "C", raw))
    return made


def _encode(text: str, encoding: str) -> bytes:
    """What protocols before 3 have for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes as {encoding!r}")
    return text.encode("latin1")


STAND_INS = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Type, ("_codecs", "encode"): _encode}
for _core in ("core", "_core"):  # by the numpy that wrote them
    STAND_INS |= {(f"numpy.{_core}.multiarray", "_reconstruct"): _Array}
    STAND_INS |= {(f"numpy.{_core}.numeric", "_frombuffer"): _from_buffer}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which the data set has no use for")
        return STAND_INS[module, name]


def _read(path: Path) -> dict[str, Any]:
    """The dictionary in a file; its keys as text, which Python 2 wrote as bytes."""
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    except MemoryError:  # says nothing about the file
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise _damaged(path, error) from None


def _damaged(path: Path, error: object) -> DataError:
    return DataError(f"{path} is no whole file of CIFAR-10 ({error}): copy or unpack it again.")


def _read_classes(path: Path) -> list[str]:
    names = _read(path).get("label_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, bytes)) for name in names):
        raise _damaged(path, "it has no list of label_names")
    return [name.decode() if isinstance(name, bytes) else name for name in names]


def _read_batch(path: Path, classes: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Pixels `(N, 3, 32, 32)`, targets `(N,)` and names `(N,)` in bytes."""
    content = _read(path)
    data, labels = content.get("data"), content.get("labels")
    if not isinstance(data, _Array) or data.values is None or data.values.size % (3 * SIDE * SIDE):
        raise _damaged(path, f"its data are no images of {SIDE} x {SIDE} pixels")
    pixels = data.values.reshape(-1, 3, SIDE, SIDE)
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise _damaged(path, f"its labels are not whole numbers below {classes}")
    names = content.get("filenames") or [f"{path.name}_{index:05d}" for index in range(len(labels))]
    if not isinstance(names, list) or not all(isinstance(name, (str, bytes)) for name in names):
        raise _damaged(path, "its filenames are no list of names")
    if not len(pixels) == len(labels) == len(names):
        raise _damaged(path, f"{len(pixels)} images, {len(labels)} labels and {len(names)} names")
    encoded = [name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape") for name in names]
    return pixels, np.array(labels, np.int64), np.array(encoded, dtype=bytes)
