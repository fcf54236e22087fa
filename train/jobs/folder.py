"""Run folders: made and removed, one job at a time in each, and files that are replaced in one step."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO

from train.jobs.errors import ConfigError, warn, writing
from train.jobs.lease import Claim, Lease

LOCK = ".lock"  # in a run folder
LOCK_SECONDS = 15
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what flock says on file systems without locks
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)  # what link says on those without hard links

_made: set[Path] = set()  # folders that this process has made


def make(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        ConfigError: it cannot be made.
    """
    folder = Path(os.path.abspath(folder))
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The run folder {folder} cannot be made: {error.strerror}.") from None
    finally:  # some of those above it may have been made
        _made.update(path for path in new if os.path.exists(path))


def take_back(folder: Path) -> None:
    """Remove a run folder that a job left empty, and the empty ones above it, if this process has made them."""
    remove_lock(folder)
    for path in (folder, *folder.parents):
        if not os.path.exists(path):  # it could not be made
            continue
        if path not in _made:
            return
        try:
            path.rmdir()
        except OSError:  # not empty
            return
        _made.discard(path)


def temporary_for(path: Path) -> Path:
    """A file next to `path` that no other process writes, on this host or another."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def link(path: Path, name: Path) -> None:
    """Give a file another name, or copy it where the file system has no hard links.

    Raises:
        FileExistsError: there is a file of that name.
    """
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with path.open("rb") as source, name.open("xb") as copy:
            shutil.copyfileobj(source, copy)


def write_once(path: Path, text: str) -> str:
    """Write a text file if there is none, and return what is in it. Processes that call this together get the same: a
    link is made in one step, and only by the first of them."""
    if not path.exists():
        fresh = temporary_for(path)
        fresh.write_text(text)
        with contextlib.suppress(FileExistsError):
            link(fresh, path)
        fresh.unlink()
    return path.read_text()


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises:
        WriteError: the disk is full or the folder cannot be written; the old file stays.
    """
    temporary = temporary_for(path)
    with writing(path):
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def lock(folder: Path) -> IO[str] | Lease:
    """Claim a run folder for as long as this process lives, or until what is returned is closed.

    The worker processes of a killed job may hold the lock for some more seconds, so a lock that is taken is tried again
    for LOCK_SECONDS. Where the file system has no locks, a lease takes their place (train/jobs/lease.py).

    Raises:
        ConfigError: another job has the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _wait_for_lock(folder)
        _remove_temporary_files(folder)
    except OSError as error:
        raise ConfigError(f"The run folder {folder} cannot be written or locked: {error.strerror}.") from None
    if held is None:
        raise ConfigError(f"Another job is running in {folder}: wait for it, or choose another folder for this one.")
    return held


def _wait_for_lock(folder: Path) -> IO[str] | Lease | None:
    """The lock, or the lease where there are no locks; None if another job keeps it. Raises OSError."""
    began = time.monotonic()
    try:
        while (file := _lock_file(folder)) is None and time.monotonic() - began < LOCK_SECONDS:
            time.sleep(0.1)
        return file
    except _NoLocks as error:
        warn(f"{folder} is on a file system without locks ({error}): a file .lease-N there keeps other jobs out.")
    claim = Claim(folder)
    while not (claim.alive and time.monotonic() - began > LOCK_SECONDS):
        if lease := claim.attempt():
            return lease
        time.sleep(0.1)
    return None


def _lock_file(folder: Path) -> IO[str] | None:
    """The folder's lock file, locked; None if another process has the lock.

    Raises:
        _NoLocks: the file system has no locks.
        OSError: the file cannot be made, or the lock fails in another way.
    """
    file = (folder / LOCK).open("w")
    try:
        if _claim(file, folder / LOCK):
            return file
    except OSError:
        file.close()
        raise
    file.close()
    return None


def _remove_temporary_files(folder: Path) -> None:
    """Those of a job that was killed while it wrote (`write_atomically`)."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def remove_lock(folder: Path) -> None:
    """Remove the lock file from a folder that holds nothing else, unless another job has, or may have, the lock."""
    path = folder / LOCK
    try:
        if os.listdir(folder) != [LOCK]:
            return
        with path.open("r+") as file:  # NFS gives exclusive locks only to files that are open for writing
            if _claim(file, path):
                path.unlink()
    except OSError:  # there is none, or the folder cannot be written, or has no locks
        return


class _NoLocks(OSError):
    """The file system has no locks."""


def _claim(file: IO[str], path: Path) -> bool:
    """Lock a file that was opened at `path`. False if another process has the lock, or if the file was removed since:
    the next job would make and lock another one.

    Raises:
        _NoLocks: the file system has no locks.
        OSError: the lock fails in another way.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise (_NoLocks(error.strerror) if error.errno in NO_LOCKS else error) from None
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
