"""Where each file of a tar archive begins, so that any one can be read by itself.

webdataset reads archives as streams, which cannot start at a chosen sample, as a resumed run must. timm's reader in tar
archives lets workers share one file position, takes classes from the innermost folder, sorts unlike a folder's reader,
and does not notice an archive that is cut off.
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
from typing import IO, NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from train.data.images import Array
from train.jobs.errors import ConfigError, DataError
from train.jobs.folder import temporary_for

Stamp = tuple[int, int, int]  # of a file: size, time of change in nanoseconds, inode
Arrays = dict[str, Array]

FOLDER = -1  # in place of a size
CACHE_FROM = 10_000  # samples; a smaller index is built faster than a run starts
CACHE_FORMAT = 1  # raise it when what is cached changes
COMPRESSED = {b"\x1f\x8b": "gzip -dk", b"BZh": "bzip2 -dk", b"\xfd7zXZ": "xz -dk", b"\x28\xb5\x2f\xfd": "zstd -d"}


# ---- bytes ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)  # there may be more shards than a process may open files
def _open(path: str, stamp: Stamp) -> IO[bytes]:
    file = open(path, "rb", buffering=0)  # noqa: SIM115  # it is closed when the cache drops it
    if stamp_of(file.fileno()) != stamp:
        file.close()
        raise DataError(f"{path} was changed after it was indexed: start again.")
    return file


def read_at(path: str, stamp: Stamp, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on. No file position is used, which forked processes would share.

    Raises:
        DataError: the file is gone, was changed, or ends before.
    """
    try:
        found = os.pread(_open(path, stamp).fileno(), size, offset)
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
        ConfigError: it is missing, a folder, or compressed.
        DataError: it is damaged or cut off, or has links in it.
    """
    _check_uncompressed(path)
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else a kilobyte a file (3.13 has stream=True)
                name = posixpath.normpath(member.name).lstrip("/")
                if member.issym() or member.islnk():
                    again = "tar --dereference --hard-dereference writes files in their place"
                    raise DataError(f"{path}: {member.name!r} is a link, which holds no bytes; {again}.")
                if member.isdir() or member.isreg():
                    yield Member(name, member.offset_data, FOLDER if member.isdir() else member.size)
            end = archive.offset
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a complete tar archive ({error}): write or copy it again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    _check_end(path, end)


def _check_uncompressed(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; a tar archive is needed.")
    with path.open("rb") as file:
        head = file.read(6)
    for magic, tool in COMPRESSED.items():
        if head.startswith(magic):
            raise ConfigError(
                f"{path} is compressed, and files within it cannot be read one by one: decompress it with "
                f"`{tool} {path}` and name the result (images are compressed already)."
            )


def _check_end(path: Path, end: int) -> None:
    """An archive ends with a block of zeros; tarfile also stops, without an error, at a damaged header or a cut."""
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{path} is damaged or cut off at byte {end}: write or copy it again.")


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not posixpath.basename(name).startswith("._")  # macOS adds those


# ---- the cache of indexes -------------------------------------------------------------------------------------------


def cached(paths: list[Path], build: Callable[[], Arrays]) -> Arrays:
    """The index of archives: from the cache, unless one of them was changed since it was built.

    The cache is $XDG_CACHE_HOME/kernelwarehouse (~/.cache/kernelwarehouse), and can be deleted at any time.
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
    temporary = temporary_for(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(place)
    except OSError:  # a full disk, a read-only home: the next run builds the index again
        temporary.unlink(missing_ok=True)


def names_array(names: list[str]) -> Array:
    """As bytes `(N,)`: a quarter of the size of text, and forked processes share it, unlike a list."""
    return np.array([name.encode("utf-8", "surrogateescape") for name in names], dtype=bytes)


def name_of(stored: bytes) -> str:
    return stored.decode("utf-8", "surrogateescape")


def numbers_array(numbers: list[int]) -> Array:
    return np.array(numbers, dtype=np.int64)
