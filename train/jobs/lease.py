"""A run folder's lock on file systems without locks, as some NFS and Lustre mounts are: a file that its holder touches.

The file `.lease-N` names the process that holds the folder. Its holder changes the file's time every few seconds; who
wants the folder waits until that stops. Then the file is stale, and the next job creates `.lease-N+1`: only one can,
since a file is created exclusively. Times are never compared with a clock, which may differ between hosts or jump: a
lease is alive if its time changes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # without a beat


class Lease:
    """A lease that this process holds until `close`, or until it ends.

    If another job takes the folder over, because this process did not run for STALE_SECONDS, this process ends: no two
    jobs may write into one folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            try:
                last = newest(self.path.parent)
                if last is not None and _number(last) > _number(self.path):
                    text = f"{self.path.parent}: another job took it over while this one stood still. This one ends."
                    print(text, file=sys.stderr, flush=True)
                    os._exit(1)
                os.utime(self.path)
            except OSError:  # the disk does not answer: whether the lease is still ours shows at the next beat
                continue

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Claim:
    """One job's attempt to get the lease of a folder, in several tries."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._seen: tuple[Path, int] | None = None  # the newest lease and its time, when it last changed
        self._since = 0.0  # of this process's clock that only counts up
        self.alive = False  # whether a holder was seen to be at work

    def attempt(self) -> Lease | None:
        """The lease, or None while another job holds it or may hold it.

        Raises:
            OSError: the folder cannot be read or written.
        """
        held = newest(self.folder)
        if held is not None and not self._is_stale(held):
            return None
        path = self.folder / f".lease-{_number(held) + 1 if held else 1}"
        try:
            file = path.open("x")
        except FileExistsError:  # another job was faster
            return None
        with file:
            json.dump({"host": _host(), "pid": os.getpid()}, file)
        for old in leases(self.folder):
            if _number(old) < _number(path):
                old.unlink(missing_ok=True)
        return Lease(path)

    def _is_stale(self, held: Path) -> bool:
        try:
            with held.open() as file:  # to open a file brings NFS up to date
                stamp, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
        except FileNotFoundError:  # it was given back just now
            return True
        if (held, stamp) != self._seen:
            self.alive = self._seen is not None and self._seen[0] == held
            self._seen, self._since = (held, stamp), time.monotonic()
        return _ended_here(text) or time.monotonic() - self._since > STALE_SECONDS


def leases(folder: Path) -> list[Path]:
    """A folder's leases, the newest last."""
    return sorted((path for path in folder.glob(".lease-*") if _number(path)), key=_number)


def newest(folder: Path) -> Path | None:
    found = leases(folder)
    return found[-1] if found else None


def _number(path: Path) -> int:
    found = re.fullmatch(r"\.lease-(\d+)", path.name)
    return int(found[1]) if found else 0


def _host() -> str:
    """The host and, for containers, the namespace that process ids belong to."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _ended_here(text: str) -> bool:
    """Whether the process that a lease names was on this host, and is gone."""
    try:
        holder = json.loads(text)
        if holder["host"] == _host():
            os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError):  # the holder is writing it now; the process is another user's
        return False
    return False
