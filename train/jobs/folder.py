"""Run folders: one job at a time in each, and files that are there whole or not at all."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from train.jobs.errors import ConfigError, writing

LOCK = ".lock"  # in a run folder
LOCK_SECONDS = 15


def write_whole(path: Path, text: str) -> None:
    """Replace a text file at once.

    Raises:
        WriteError: the disk is full or the folder cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
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
    """Claim a run folder for as long as this process lives (or the file returned is open).

    A job that was killed may leave helpers behind that take some seconds to notice; that long it is tried again.

    Raises:
        ConfigError: another job is at work there, or the folder cannot be written.
    """
    for _ in range(round(LOCK_SECONDS * 10)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("w")
        except OSError as error:
            raise ConfigError(f"The run folder {folder} cannot be written: {error.strerror}.") from None
        if _claim(file, folder / LOCK):
            return file
        file.close()
        time.sleep(0.1)
    raise ConfigError(f"Another job is at work in {folder}: wait for it, or give this one a folder of its own.")


def remove_lock(folder: Path) -> None:
    """Take away the lock file of a folder that holds nothing else, unless a job is at work there."""
    path = folder / LOCK
    try:
        with path.open() as file:
            if _claim(file, path) and os.listdir(folder) == [LOCK]:
                path.unlink()
    except OSError:  # there is none, or the folder cannot be written
        return


def _claim(file: IO[str], path: Path) -> bool:
    """Lock a file that was opened at `path`; False if another process has it, or if it was removed since: then it is no
    longer what others meet at."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
