"""A trial: one fault, and whether the program met it as it should: with a run, or with an error of one line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TRACEBACK = "Traceback (most recent call last)"


@dataclass
class Row:
    """The trials of one fault."""

    fault: str
    tried: int = 0
    survived: int = 0
    wrong: list[str] = field(default_factory=list)
    left_out: str = ""  # why nothing was tried

    def add(self, trial: str, wrong: str | None) -> None:
        """Count a trial; `wrong` says what was wrong, if anything."""
        print(f"{self.fault}: {trial}: {wrong or 'survived'}", file=sys.stderr, flush=True)
        self.tried += 1
        if wrong is None:
            self.survived += 1
        else:
            self.wrong.append(f"{trial}: {wrong}")


@dataclass
class Ended:
    """How a process ended: its exit status, None if it was still running when its time was up; and what it printed."""

    status: int | None
    text: str

    @property
    def last_line(self) -> str:
        lines = [line for line in self.text.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def is_kind(ended: Ended, may_run: bool = True) -> str | None:
    """What is wrong with an end that should be a run or an error without a traceback; None if nothing is."""
    if TRACEBACK in ended.text:
        return f"a traceback, {ended.last_line}"
    if ended.status is None or ended.status == 0:
        return None if may_run else "no error"
    if ended.status < 0:
        return f"killed by signal {-ended.status}"
    return None if ended.last_line else f"exit status {ended.status} without a word"


def start(words: Sequence[str], module: str = "train", before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`python -m MODULE WORDS` in a session of its own; `before` are words in front of the command."""
    command = [*before, sys.executable, "-m", module, *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )


def end_of(process: subprocess.Popen[str], seconds: float = 300) -> Ended:
    """Wait for a process; one that takes longer is killed, with what it started."""
    try:
        text, _ = process.communicate(timeout=seconds)
        return Ended(process.returncode, text)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        text, _ = process.communicate()
        return Ended(None, text)


def run(words: Sequence[str], module: str = "train", seconds: float = 300) -> Ended:
    return end_of(start(words, module), seconds)


def forked(work: Callable[[], object], seconds: float = 60) -> Ended:
    """Call `work` in a fork of this process, which has imported everything already, as if it were a program."""
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            status = 1
            try:
                work()
                status = 0
            except SystemExit as leaving:
                if isinstance(leaving.code, str):
                    print(leaving.code, file=sys.stderr)
                status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        deadline = time.monotonic() + seconds
        ended = 0
        while not ended and time.monotonic() < deadline:
            ended, code = os.waitpid(child, os.WNOHANG)
            if not ended:
                time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, 9)  # also what it started
        if not ended:
            os.waitpid(child, 0)
        out.seek(0)
        return Ended(os.waitstatus_to_exitcode(code) if ended else None, out.read())


def in_folder(place: Path) -> str:
    return f"hydra.run.dir={place}"
