"""Run folders: made and removed, one job at a time in each, and files that are replaced in one step."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from train.jobs.errors import ConfigError, warn, writing

LOCK = ".lock"  # in a run folder
LOCK_SECONDS = 15
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what flock says on file systems without locks

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


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises:
        WriteError: the disk is full or the folder cannot be written; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def lock(folder: Path) -> IO[str]:
    """Claim a run folder for as long as this process lives, or until the returned file is closed.

    The worker processes of a killed job may hold the lock for some more seconds, so a lock that is taken is tried again
    for LOCK_SECONDS.

    Raises:
        ConfigError: another job has the lock, or the folder cannot be written.
    """
    for _ in range(round(LOCK_SECONDS * 10)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("w")
            if _claim(file, folder / LOCK):
                _remove_temporary_files(folder)
                return file
        except OSError as error:
            raise ConfigError(f"The run folder {folder} cannot be written or locked: {error.strerror}.") from None
        file.close()
        time.sleep(0.1)
    raise ConfigError(f"Another job is running in {folder}: wait for it, or choose another folder for this one.")


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
            if _claim(file, path, without_locks=False):
                path.unlink()
    except OSError:  # there is none, or the folder cannot be written
        return


def _claim(file: IO[str], path: Path, without_locks: bool = True) -> bool:
    """Lock a file that was opened at `path`. False if another process has the lock, or if the file was removed since:
    the next job would make and lock another one.

    Args:
        without_locks: the result where the file system has no locks.

    Raises:
        OSError: the lock fails in another way.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if not without_locks:
            return False
        warn(f"{path} cannot be locked ({error.strerror}): make sure that no other job uses this folder.")
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
