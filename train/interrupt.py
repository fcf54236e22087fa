"""Leaving well: signals that ask to save and go, and a lock that keeps a second job out of a run folder."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from train.errors import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LOCK = ".lock"  # in a run folder
LOCK_SECONDS = 15


class StopRequest:
    """Within `with`, remembers that one of SIGNALS came, for the trainer to save and leave; outside, they mean what
    they did before.

    In a job of one process, a second Ctrl-C interrupts at once. In larger ones every process gets the first one twice,
    from the terminal and from its launcher; the launcher ends them at a second.
    """

    def __init__(self, alone: bool = True) -> None:
        self.alone = alone
        self.signal = 0

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.alone and number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def came(self) -> list[bool]:
        """For each of SIGNALS, whether it was the last to come: numbers that processes can add up."""
        return [self.signal == number for number in SIGNALS]


def first_signal(counts: Sequence[int]) -> int:
    """The first of SIGNALS that came to any process, by the sums of `came`; 0 if none did."""
    return next((number for number, count in zip(SIGNALS, counts, strict=True) if count), 0)


def requeue() -> bool:
    """Put this job back into SLURM's queue, if it runs there; the run then goes on from its checkpoint."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    return subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0


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
    raise ConfigError(f"Another job is at work in {folder}: wait for it, or give this one a label=... of its own.")


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
