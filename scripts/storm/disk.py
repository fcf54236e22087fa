"""A full disk at each kind of write, a read-only folder, and a clock that jumps back."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.kill_storm import SMALL, differences, outcome
from scripts.storm.trials import Ended, Row, end_of, is_kind, run

# `python -m train` with a clock that is an hour earlier at every tenth reading.
JUMPING = """
import itertools, runpy, sys, time
now, count = time.time, itertools.count()
time.time = lambda: now() - 3600 * (next(count) // 10)
sys.argv = ["train", *sys.argv[1:]]
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""
KILOBYTES = (4, 40, 100, 200, 400, 800, 1200, 1600, 2400)


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[bool]:
    """A small file system of its own at `place`; False where this user may not mount one."""
    place.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(place)], check=False)


def full_disks(place: Path, calm: Path) -> Row:
    """A run on disks of growing size, so that each kind of write meets the end of one. It stops in one line that names
    a file; with more space the same command goes on, to the same result to the bit."""
    row, expected = Row("full disk"), outcome(calm)
    for size in KILOBYTES:
        disk = place / f"disk{size}"
        with mounted(disk, f"size={size}k") as may:
            if not may:
                row.left_out = "this user may not mount a file system"
                return row
            words = [*SMALL, f"hydra.run.dir={disk / 'run'}"]
            ended = run(words)
            wrong = is_kind(ended)
            if wrong is None and ended.status != 0:
                named = str(disk) in ended.text
                subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
                after = run(words)
                wrong = None if named else f"names no file: {ended.last_line}"
                wrong = wrong or (after.last_line if after.status else _as_calm(disk / "run", expected))
            row.add(f"{size} KB", wrong)
    return row


def read_only(place: Path) -> Row:
    row = Row("read-only folder")
    with mounted(place / "fixed", "ro") as may:
        if not may:
            row.left_out = "this user may not mount a file system"
            return row
        for module, words in (("train", SMALL), ("detection", ["config=mask_rcnn_kw1x_digits"])):
            ended = run([*words, f"hydra.run.dir={place / 'fixed' / 'run'}"], module)
            row.add(module, is_kind(ended, may_run=False) or (None if "fixed" in ended.text else "names no folder"))
    return row


def clock_back(place: Path, calm: Path) -> Row:
    row = Row("clock that jumps back")
    process = subprocess.Popen(
        [sys.executable, "-c", JUMPING, *SMALL, f"hydra.run.dir={place / 'jumping'}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    ended: Ended = end_of(process)
    row.add("train", ended.last_line if ended.status else _as_calm(place / "jumping", outcome(calm)))
    return row


def _as_calm(folder: Path, expected: dict[str, object]) -> str | None:
    different = differences(expected, outcome(folder))
    return f"different: {', '.join(different[:3])}" if different else None
