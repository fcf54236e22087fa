"""Files at URLs: downloads that are checked and retried, and a cache of them on the node's disk.

webdataset 1.0.2, which opens URLs by curl, was tried against a server with faults. It retries a status 503, but not a
connection that is dropped or a body that is cut off, where `warn_and_continue` makes the epoch shorter; it waits for
ever on a connection that stalls; and its streams cannot start at a chosen sample, as a resumed run must. So shards are
fetched whole, compared with the digest in their index, and read like local ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import os
import random
import re
import selectors
import shlex
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, TypeVar

import fsspec

from train.jobs.errors import ConfigError, DataError, warn
from train.jobs.folder import NO_LOCKS

if TYPE_CHECKING:
    from train.config import RemoteConfig

T = TypeVar("T")
CHUNK = 2**20  # bytes
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a download is tried again; the wait doubles each time
ABANDONED = 3600.0  # seconds; a download to which nothing was added for so long was killed
TRANSIENT = (408, 425, 429)  # of the statuses 4xx; the others do not go away


# ---- bytes ----------------------------------------------------------------------------------------------------------


def is_url(root: str) -> bool:
    """Whether it is a URL or webdataset's `pipe:COMMAND`, and not a path."""
    return re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", root) is not None


def url_of(root: str, name: str) -> str:
    """The URL of a file: `name` in place of {} in `root`, or else below it.

    Raises:
        ConfigError: a command has no {}.
    """
    if "{}" in root:
        return root.replace("{}", shlex.quote(name))
    if root.startswith("pipe:"):
        raise ConfigError(f"{root!r} needs {{}} where the file's name belongs: pipe:aws s3 cp s3://BUCKET/{{}} -")
    return f"{root.rstrip('/')}/{name}"


def chunks(url: str, timeout: float) -> Iterator[bytes]:
    """The bytes at a URL: of a command's output (pipe:), by HTTP, or by the package that fsspec names for the scheme.

    Raises:
        OSError, http.client.HTTPException, or what that package raises: the connection failed, or none came for
            `timeout` seconds.
        ConfigError: fsspec does not know the scheme, or its package is not installed.
    """
    if url.startswith("pipe:"):
        yield from _output(url.removeprefix("pipe:"), timeout)
    elif url.startswith(("http://", "https://")):
        yield from _body(url, timeout)
    else:
        try:
            opened = fsspec.open(url, "rb")
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{url}: {error} Or use a command: data.root='pipe:aws s3 cp s3://BUCKET/{{}} -'."
            ) from None
        with opened as file:
            while chunk := file.read(CHUNK):
                yield chunk


def _body(url: str, timeout: float) -> Iterator[bytes]:
    with urllib.request.urlopen(url, timeout=timeout) as response:
        announced, found = response.headers.get("Content-Length"), 0
        while chunk := response.read(CHUNK):
            found += len(chunk)
            yield chunk
    if announced is not None and found != int(announced):  # `read` with a size returns less, without an error
        raise ConnectionError(f"the connection was lost after {found} of {announced} bytes")


def _output(command: str, timeout: float) -> Iterator[bytes]:
    # A session of its own, so that all of a pipeline can be killed.
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=said, start_new_session=True) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while True:
                if not selector.select(timeout):
                    raise TimeoutError(f"no bytes came for {timeout:g} s")
                if not (chunk := os.read(process.stdout.fileno(), CHUNK)):
                    break
                yield chunk
            if status := process.wait(timeout):
                said.seek(0)
                last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise ConnectionError(f"the command ended with status {status}{': ' if last else ''}{last}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


# ---- again and again ------------------------------------------------------------------------------------------------


def retrying(url: str, remote: RemoteConfig, attempt: Callable[[], T]) -> T:
    """What `attempt` returns. After an error it is tried again, at most data.remote.retries times, later and later.

    Raises:
        DataError: it failed each time, or in a way that will not change, such as by status 404.
        ConfigError: from `attempt`, at once.
    """
    for retry in range(remote.retries + 1):
        try:
            return attempt()
        except (ConfigError, DataError, MemoryError):
            raise
        except Exception as error:  # packages for storage raise errors of their own
            problem = str(error) or type(error).__name__
            if _is_final(error):
                raise DataError(f"{url} cannot be read: {problem}. data.root names where the shards are.") from None
        if retry < remote.retries:
            # Processes that failed together do not come back together. Not by the seeded generator, which augments.
            wait = min(FIRST_WAIT * 2**retry, LONGEST_WAIT) * random.SystemRandom().uniform(0.5, 1)
            warn(f"{url}: {problem}; retry {retry + 1} of {remote.retries} in {wait:.1f} s.")
            time.sleep(wait)
    raise DataError(
        f"{url} could not be read in {remote.retries + 1} tries: {problem}. data.remote.retries={remote.retries} and "
        f"data.remote.timeout={remote.timeout:g} (seconds without a byte) can be raised."
    )


def _is_final(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in TRANSIENT
    return isinstance(error, (FileNotFoundError, PermissionError, http.client.InvalidURL))


# ---- the cache ------------------------------------------------------------------------------------------------------


class Remote(NamedTuple):
    """A file at a URL whose content is known."""

    url: str
    size: int  # bytes
    digest: str  # `digest_of` its bytes


def digest_of(blocks: Iterator[bytes]) -> tuple[int, str]:
    """Size and digest of a file's bytes."""
    size, digest = 0, hashlib.blake2b(digest_size=16)
    for block in blocks:
        size += len(block)
        digest.update(block)
    return size, digest.hexdigest()


class Cache:
    """Files on the node's disk, which all processes of the node share. The ones not used for longest make room.

    Raises:
        ConfigError: the folder is another user's, or cannot be made.
    """

    def __init__(self, remote: RemoteConfig):
        self.remote, self.limit = remote, round(remote.cache_gb * 1e9)
        default = Path(tempfile.gettempdir()) / f"kernelwarehouse-shards-{os.getuid()}"
        self.folder = Path(remote.cache).expanduser() if remote.cache else default
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.remote.cache={str(self.folder)!r} cannot be made: {error.strerror}.") from None
        if not remote.cache and self.folder.stat().st_uid != os.getuid():  # anyone can make folders in /tmp
            raise ConfigError(f"{self.folder} belongs to another user: name another folder by data.remote.cache=PATH.")

    def read(self, file: Remote, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset` on, which is downloaded if it is not here.

        Raises:
            DataError: it cannot be downloaded, or ends before.
        """
        while True:
            path = self.fetch(file)
            try:
                with path.open("rb", buffering=0) as opened:
                    os.utime(path)  # last use
                    found = os.pread(opened.fileno(), size, offset)
            except FileNotFoundError:  # it made room for another in the meantime
                continue
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}.") from None
            if len(found) != size:
                raise DataError(f"{file.url} ends within the {size} bytes from {offset} on: index the shards again.")
            return found

    def fetch(self, file: Remote, retries: int | None = None) -> Path:
        """The path of a file, which is downloaded if it is not here; by one process, if several want it."""
        remote = self.remote if retries is None else dataclasses.replace(self.remote, retries=retries)
        path = self.folder / f"{file.digest}.tar"
        if not _has(path, file.size):
            with self._lock(file.digest):
                if not _has(path, file.size):
                    retrying(file.url, remote, lambda: self._download(file, path))
        return path

    def _download(self, file: Remote, path: Path) -> None:
        self._make_room(file.size)
        part = path.with_suffix(f".{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            with _keeping(part, self.remote):
                opened = part.open("wb")
            with opened:
                size, digest = digest_of(self._kept(file, opened, part))
            if size != file.size:
                raise ConnectionError(f"it has {size} bytes, and {file.size} by the index of the shards")
            if digest != file.digest:
                raise ConnectionError("it has other bytes than when the shards were indexed")
            with _keeping(part, self.remote):
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _kept(self, file: Remote, opened: IO[bytes], part: Path) -> Iterator[bytes]:
        for chunk in chunks(file.url, self.remote.timeout):
            with _keeping(part, self.remote):
                opened.write(chunk)
            yield chunk

    def _make_room(self, size: int) -> None:
        """Remove the files not used for longest, parts of killed processes among them, until one of `size` fits."""
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix in (".tar", ".part"):
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        excess = sum(length for _, length, _ in files) + size - self.limit
        for changed, length, path in sorted(files):
            if excess <= 0:
                return
            if path.suffix == ".tar" or changed < time.time() - ABANDONED:
                path.unlink(missing_ok=True)  # a process that has it open reads on
                excess -= length

    @contextlib.contextmanager
    def _lock(self, digest: str) -> Iterator[None]:
        """Hold one of 256 locks. Without locks in the file system, a file may be downloaded twice, and is the same."""
        path = self.folder / f"{digest[:2]}.lock"
        with contextlib.ExitStack() as stack:
            try:
                fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise DataError(f"data.remote.cache: {path} cannot be locked: {error.strerror}.") from None
            yield


def _has(path: Path, size: int) -> bool:
    """A power failure may leave a file of the right name and another size."""
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _keeping(part: Path, remote: RemoteConfig) -> Iterator[None]:
    """A full disk is not the network's fault."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{part} could not be written: {error.strerror}. data.remote.cache=PATH names another disk, and "
            f"data.remote.cache_gb={remote.cache_gb:g} is what it may hold."
        ) from None
