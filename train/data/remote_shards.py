"""Shards at URLs, and the index that tells what is in them without reading them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.data import tar
from train.data.remote import CHUNK, Cache, Remote, chunks, digest_of, is_url, retrying, url_of
from train.data.shards import Shards, index_of, shard_samples
from train.jobs.errors import ConfigError, DataError, writing

if TYPE_CHECKING:
    from train.config import DataConfig, RemoteConfig


def index_name(split: str) -> str:
    """Of a split's index, next to its shards."""
    return f"{split}.index.npz"


def make_index(shards: Iterable[Path]) -> tar.Arrays:
    """The index of a split: what `index_shards` has of its samples; and of its shards, their names `shards` (S,),
    `bytes` (S,) and `digests` (S,). The classes are not in it yet.

    Args:
        shards: each is read before the next is asked for.

    Raises:
        DataError: a shard is damaged.
    """
    names, digests, samples = [], [], []
    for path in shards:
        with path.open("rb") as file:
            digests.append(digest_of(iter(lambda: file.read(CHUNK), b"")))
        names.append(path.name)
        samples.append(shard_samples(path))
    return {
        **index_of(samples),
        "shards": tar.names_array(names),
        "bytes": tar.numbers_array([size for size, _ in digests]),
        "digests": tar.names_array([digest for _, digest in digests]),
    }


def parse_index(content: bytes) -> tar.Arrays:
    """The arrays of an index. Damage is noticed by the sums in it: np.load does not compare all of them.

    Raises:
        ValueError, or what zipfile, zlib and numpy raise: it is damaged.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if bad := archive.testzip():
            raise ValueError(f"{bad} is damaged")
    with np.load(io.BytesIO(content)) as stored:
        return {key: stored[key] for key in stored.files}


def write_index(folder: Path, split: str, index: tar.Arrays, classes: list[str]) -> None:
    """Write SPLIT.index.npz in one step."""
    temporary = folder / f".{index_name(split)}.tmp"
    with writing(folder / index_name(split)), temporary.open("wb") as file:
        np.savez_compressed(file, **index, classes=tar.names_array(classes))  # type: ignore[arg-type]
    temporary.replace(folder / index_name(split))


class RemoteShards(Shards):
    """Shards below a URL, or by a command (`pipe:`), read from the node's cache of them. Beside them is the index of
    each split, or at data.remote.index.

    Raises:
        ConfigError: data.remote.cache_gb holds too few shards, or they have no samples.
        DataError: the index is missing or damaged, or cannot be downloaded.
    """

    def __init__(self, data: DataConfig, split: str):
        root, remote = str(data.root), data.remote
        index = _read_index(remote.index or root, split, remote)
        names = [tar.name_of(name) for name in index["shards"].tolist()]
        classes = [tar.name_of(name) for name in index["classes"].tolist()]
        super().__init__(root, names, index, classes, data.window, data.parts)
        self.files = [
            Remote(url_of(root, name), int(size), digest.decode())
            for name, size, digest in zip(names, index["bytes"], index["digests"].tolist(), strict=True)
        ]
        self.cache = Cache(remote)
        largest = max(file.size for file in self.files)
        if self.cache.limit < 2 * data.window * largest:
            least = 2 * data.window * largest / 1e9
            raise ConfigError(
                f"data.remote.cache_gb={remote.cache_gb:g} is too small: {data.window} shards (data.window) are read "
                f"while as many are downloaded, of up to {largest / 1e9:.3g} GB each. It needs {least:.3g} or more."
            )
        # To keep all parts at work, the next window of each is downloaded while this one is read.
        self.ahead = self.window * self.parts * int(np.diff(self.starts).max())

    def read(self, index: int) -> bytes:
        file = self.files[self.shard_of(index)]
        return self.cache.read(file, int(self.offsets[index]), int(self.sizes[index]))

    def source(self, index: int) -> int:
        return self.shard_of(index)

    def fetch(self, source: int) -> None:
        self.cache.fetch(self.files[source], retries=0)  # the worker that needs it has them


def _read_index(place: str, split: str, remote: RemoteConfig) -> tar.Arrays:
    url = url_of(place, index_name(split)) if is_url(place) else str(Path(place).expanduser() / index_name(split))

    def attempt() -> tar.Arrays:
        content = b"".join(chunks(url, remote.timeout)) if is_url(url) else Path(url).read_bytes()
        try:
            return parse_index(content)
        except Exception as error:  # zipfile, zlib and numpy have many for damaged files
            raise ConnectionError(f"it is not a complete index ({error})") from None

    try:
        index = retrying(url, remote, attempt)
    except DataError as error:
        raise DataError(f"{error} `python -m scripts.data.index FOLDER` makes the index of shards.") from None
    wanted = ("names", "offsets", "sizes", "targets", "counts", "shards", "bytes", "digests", "classes")
    if missing := [key for key in wanted if key not in index]:
        raise DataError(f"{url} is not an index of shards: it has no {missing[0]!r}. Make it by scripts.data.index.")
    return index
