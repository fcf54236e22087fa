"""Tar archives and WebDataset shards: which files are in them and where, so that any one can be read by itself.

The webdataset library is not used: its pipelines are streams, whose place cannot be told or resumed exactly and whose
samples depend on the number of workers; the indexed readers beside it want files of their own format to index shards.
What is needed here is little: the offsets of the members, once.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from train.jobs.errors import ConfigError, DataError

Array = np.ndarray[Any, Any]
Stamp = tuple[int, int, int]  # of a file: size, time of change in nanoseconds, inode
Arrays = dict[str, Array]

FOLDER = -1  # in place of a size
CACHE_FROM = 10_000  # samples; what is indexed faster than a run starts is not worth a file
CACHE_FORMAT = 1  # raise it when what is cached changes
COMPRESSED = {b"\x1f\x8b": "gzip -dk", b"BZh": "bzip2 -dk", b"\xfd7zXZ": "xz -dk", b"\x28\xb5\x2f\xfd": "zstd -d"}


# ---- bytes ----------------------------------------------------------------------------------------------------------


class Descriptor:
    """An open file, closed with the last reference to it."""

    def __init__(self, path: str, stamp: Stamp):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if stamp_of(self.number) != stamp:
            raise DataError(f"{path} was changed after it was indexed: start again.")

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=64)  # many shards, and a process may open but so many files
def _open(path: str, stamp: Stamp, process: int) -> Descriptor:
    return Descriptor(path, stamp)


def read_at(path: str, stamp: Stamp, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, by a descriptor of this process and no position that others could move.

    Raises:
        DataError: the file is gone, was changed, or ends before.
    """
    try:
        found = os.pread(_open(path, stamp, os.getpid()).number, size, offset)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if len(found) != size:
        raise DataError(f"{path} ends within the {size} bytes from {offset} on: it was cut off.")
    return found


def stamp_of(file: str | Path | int) -> Stamp:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns, status.st_ino


# ---- members --------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    name: str  # without ./ in front or / at the end
    offset: int  # of its bytes in the archive
    size: int  # FOLDER for a folder


def members(path: Path) -> Iterator[Member]:
    """Files and folders of an uncompressed tar archive, by its headers.

    Raises:
        DataError: it is no tar archive, damaged, cut off, or has links in it.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # which would else grow to a kilobyte a file
                name = posixpath.normpath(member.name).lstrip("/")
                if member.issym() or member.islnk():
                    again = "tar --dereference --hard-dereference writes files in their place"
                    raise DataError(f"{path}: {member.name!r} is a link, which has no bytes of its own; {again}.")
                if member.isdir() or member.isreg():
                    yield Member(name, member.offset_data, FOLDER if member.isdir() else member.size)
            end = archive.offset
    except tarfile.TarError as error:
        raise DataError(f"{path} is no whole tar archive ({error}): write or copy it again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    _check_end(path, end)


def _check_plain(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path} is {'a folder' if path.is_dir() else 'no file'}, where a tar archive is wanted.")
    with path.open("rb") as file:
        head = file.read(6)
    for magic, tool in COMPRESSED.items():
        if head.startswith(magic):
            raise ConfigError(
                f"{path} is compressed, and files within it cannot be read one by one: decompress it with "
                f"`{tool} {path}` and name the result (images are compressed already)."
            )


def _check_end(path: Path, end: int) -> None:
    """tarfile takes a damaged header, and the end of the file, for the end of the archive: a block of zeros is."""
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{path} is damaged or cut off at byte {end}: write or copy it again.")


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not posixpath.basename(name).startswith("._")  # macOS adds those


# ---- an archive of folders ------------------------------------------------------------------------------------------


def index_archive(path: Path) -> Arrays:
    """All folders and images of an archive: `names` (N,) in bytes, `offsets` (N,), `sizes` (N,). Kept for later."""

    def build() -> Arrays:
        kept = [member for member in members(path) if member.size == FOLDER or is_image(member.name)]
        places = {"offsets": _numbers([m.offset for m in kept]), "sizes": _numbers([m.size for m in kept])}
        return {"names": _names([member.name for member in kept]), **places}

    _check_plain(path)
    return cached([path], build)


def split_of(path: Path, index: Arrays, split: str, setting: str) -> tuple[Arrays, list[str]]:
    """The images at `.../split/<class>/...` in the order that torchvision's ImageFolder has them in, with their
    `targets`, and the classes. `setting` is what names the split.

    Raises:
        ConfigError: there is no such split, it is there twice, or a class of it has no images.
    """
    names = [name.decode("utf-8", "surrogateescape") for name in index["names"].tolist()]
    base = _split_folder(path, names, split, setting)
    depth = base.count("/") + 1
    files: list[tuple[str, str, str, int]] = []  # class, folder, file, row in the index
    classes = set()
    for row, name in enumerate(names):
        if name.startswith(base + "/"):
            parts = name.split("/")
            if index["sizes"][row] != FOLDER and len(parts) > depth + 1:
                files.append((parts[depth], posixpath.dirname(name), parts[-1], row))
            elif index["sizes"][row] == FOLDER:
                classes.add(parts[depth])
    files.sort()
    filled = {file[0] for file in files}
    if empty := sorted(classes - filled):
        raise ConfigError(f"{path}: {base}/{empty[0]} has no images ({', '.join(IMG_EXTENSIONS)}).")
    numbers = {name: number for number, name in enumerate(sorted(filled))}
    rows = _numbers([file[3] for file in files])
    columns = {key: column[rows] for key, column in index.items()}
    return {**columns, "targets": _numbers([numbers[file[0]] for file in files])}, sorted(filled)


def _split_folder(path: Path, names: list[str], split: str, setting: str) -> str:
    """The folder of a split, with those that lead to it: the highest that has files two levels below."""
    found, others = set(), set()
    for name in names:
        parts = name.split("/")
        if split in parts[:-2]:
            found.add("/".join(parts[: parts.index(split) + 1]))
        elif len(parts) > 2:
            others.add(parts[-3])
    if not found:
        raise ConfigError(
            f"{path} has no folder {split!r} of classes with images; it has "
            f"{', '.join(sorted(others)[:6]) or 'none'}. {setting}: a folder's name."
        )
    depth = min(name.count("/") for name in found)
    highest = sorted(name for name in found if name.count("/") == depth)
    if len(highest) > 1:
        raise ConfigError(f"{path} has {split!r} twice, at {highest[0]!r} and {highest[1]!r}: one must be left out.")
    return highest[0]


# ---- shards ---------------------------------------------------------------------------------------------------------


def index_shards(paths: list[Path]) -> Arrays:
    """The samples of shards, one shard after the other: `names` (N,), their keys in bytes; `offsets` (N,) and `sizes`
    (N,) of the images, `targets` (N,), and `counts` (shards,), how many a shard has. Kept for later."""

    def build() -> Arrays:
        shards = [shard_samples(path) for path in paths]
        samples = [sample for shard in shards for sample in shard]
        index = {"names": _names([key for key, *_ in samples]), "counts": _numbers([len(shard) for shard in shards])}
        columns = ((1, "offsets"), (2, "sizes"), (3, "targets"))
        return index | {name: _numbers([int(sample[place]) for sample in samples]) for place, name in columns}

    return cached(paths, build)


def shard_samples(path: Path) -> list[tuple[str, int, int, int]]:
    """Key, offset and size of the image, and target, of each sample in a shard; none in an empty one.

    Raises:
        DataError: naming shard and key, a sample has not exactly one image and one whole number in `.cls`.
    """
    _check_plain(path)
    found: dict[str, dict[str, Member]] = {}
    for member in members(path):
        folder, file = posixpath.split(member.name)
        stem, dot, ending = file.partition(".")  # as webdataset has it: the key goes up to the first dot
        if member.size == FOLDER or not stem or not dot:
            continue
        parts = found.setdefault(posixpath.join(folder, stem), {})
        if ending.lower() in parts:
            raise DataError(f"{path}: {member.name!r} is there twice; a key can be that of one sample only.")
        parts[ending.lower()] = member
    stamp = stamp_of(path)
    samples = []
    for key, parts in found.items():
        images = [ending for ending in parts if f".{ending}" in IMG_EXTENSIONS]
        if not images and "cls" not in parts:
            continue  # no sample: a note, or the like
        if len(images) != 1 or "cls" not in parts:
            has = ", ".join(f".{ending}" for ending in parts)
            raise DataError(f"{path}: sample {key!r} has {has}; it needs one image and .cls, the number of its class.")
        target = _whole_number(path, key, read_at(str(path), stamp, parts["cls"].offset, parts["cls"].size))
        samples.append((key, parts[images[0]].offset, parts[images[0]].size, target))
    return samples


def _whole_number(path: Path, key: str, text: bytes) -> int:
    if not text.strip().isdigit():
        raise DataError(f"{path}: {key}.cls has {text[:20]!r}; it needs the number of a class, from 0 up.")
    return int(text)


# ---- what is kept of an index ---------------------------------------------------------------------------------------


def cached(paths: list[Path], build: Callable[[], Arrays]) -> Arrays:
    """The index of archives, from the cache if it was built before and they were not changed since.

    It is in $XDG_CACHE_HOME/kernelwarehouse (~/.cache/kernelwarehouse), and can be deleted at any time.
    """
    identity = repr((CACHE_FORMAT, [(str(path.resolve()), stamp_of(path)) for path in paths]))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kernelwarehouse"
    place = root / f"{hashlib.sha1(identity.encode('utf-8', 'surrogateescape')).hexdigest()}.npz"
    try:
        with np.load(place) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        arrays = build()
    if len(arrays["names"]) >= CACHE_FROM:
        _keep(place, arrays)
    return arrays


def _keep(place: Path, arrays: Arrays) -> None:
    temporary = place.with_name(f"{place.stem}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(place)
    except OSError:  # a full disk, a home that is read-only: the next run builds it again
        temporary.unlink(missing_ok=True)


def _names(names: list[str]) -> Array:
    """As bytes `(N,)`: a quarter of the size of text, and processes share it when they fork, unlike a list."""
    return np.array([name.encode("utf-8", "surrogateescape") for name in names], dtype=bytes)


def _numbers(numbers: list[int]) -> Array:
    return np.array(numbers, dtype=np.int64)
