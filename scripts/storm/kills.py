"""SIGKILL of the launcher, of a worker and of a process that loads data; and several jobs on one folder at once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

from scripts.kill_storm import SMALL, differences, outcome
from scripts.storm.trials import Row, end_of, is_kind, run, start

VICTIMS = {
    # settings, and which process below the launcher is killed: none (itself), or the deepest
    "launcher of one process": (["runtime.devices=1"], False),
    "launcher of two": (["runtime.devices=2"], False),
    "a worker of two": (["runtime.devices=2"], True),
    "a data worker": (["runtime.devices=1", "runtime.workers=1"], True),
}


def kills(count: int, place: Path, calm: dict[int, Path], seed: int = 0) -> Row:
    """Kill each kind of process `count` times, at random moments after the first checkpoint, then let the run end: it
    must be the undisturbed one to the bit.

    Args:
        calm: undisturbed run folders by their number of processes.
    """
    row, chance = Row("SIGKILL"), random.Random(seed)
    for name, (settings, child) in VICTIMS.items():
        folder = place / name.replace(" ", "_")
        words = [*SMALL, *settings, f"hydra.run.dir={folder}"]
        wrong = None
        for _ in range(count):
            process = start(words)
            while process.poll() is None and not (folder / "checkpoints" / "last.pt").exists():
                time.sleep(0.05)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.2, 3))
            with contextlib.suppress(ProcessLookupError):
                os.kill(below(process.pid)[-1] if child else process.pid, signal.SIGKILL)
            ended = end_of(process)
            # Whoever is left notices and leaves by itself; only what was killed itself ends by a signal.
            if child and ended.status and ended.status != -signal.SIGKILL:
                wrong = wrong or is_kind(ended)
        last = run(words)
        different = (
            differences(outcome(calm[2 if "devices=2" in settings[0] else 1]), outcome(folder))
            if not last.status
            else []
        )
        wrong = wrong or (last.last_line if last.status else None)
        row.add(name, wrong or (f"different: {', '.join(different[:3])}" if different else None))
    return row


def many_on_one_folder(count: int, place: Path, calm: Path) -> Row:
    """So many jobs started on one folder at once, half of them on a "node" of another name: one runs, the others say
    that another is at work, and the result is the undisturbed one."""
    row, folder = Row(f"{count} jobs on one folder"), place / "shared"
    node = ["unshare", "--uts", "sh", "-c", 'hostname node2 && exec "$@"', "-"]
    may = subprocess.run([*node, "true"], capture_output=True).returncode == 0
    words = [*SMALL, f"hydra.run.dir={folder}"]
    processes = [start(words, before=node if may and number % 2 else ()) for number in range(count)]
    ends = [end_of(process) for process in processes]
    for number, ended in enumerate(ends):
        row.add(f"job {number}", is_kind(ended))
    # One that came later may have found the run finished, and so ended well, too.
    if not any(ended.status == 0 for ended in ends):
        row.add("all", "no job ran")
    elif different := differences(outcome(calm), outcome(folder)):
        row.add("all", f"different: {', '.join(different[:3])}")
    return row


def below(pid: int) -> list[int]:
    """The process and all that it has started, children last (Linux)."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found
