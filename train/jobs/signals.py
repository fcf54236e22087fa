"""Signals that ask a run to save and exit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from threading import Thread
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """In a `with` block, remembers which of SIGNALS came last, for the trainer to save and exit; after the block the
    former handlers are back.

    In a job of one process, a second Ctrl-C interrupts at once. In a job of several, every process gets the first
    Ctrl-C twice, from the terminal and from its launcher; at the second one the launcher ends them.
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
        """For each of SIGNALS, whether it came last: numbers that an all-reduce can sum."""
        return [self.signal == number for number in SIGNALS]


def first_signal(counts: Sequence[int]) -> int:
    """The first of SIGNALS that any process got, from the sums of `came`; 0 if none did."""
    return next((number for number, count in zip(SIGNALS, counts, strict=True) if count), 0)


def requeue() -> bool:
    """Put this job back into SLURM's queue, to continue from its checkpoint; False outside SLURM, or if it failed."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    return subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0


def leave(number: int, main: bool, when: str, say: Callable[[str], None]) -> NoReturn:
    """Exit after signal `number`, once all ranks have saved. SIGUSR1 says that the job's time is up: it goes back into
    SLURM's queue. At SIGTERM SLURM itself requeues what it preempts, and the user may have cancelled the job.

    Args:
        main: whether this is rank 0.
        when: where the run is, for the message: "after step 3 of 8".
        say: prints the message.

    Raises:
        SystemExit: always, with 128 + number.
    """
    again = main and number == signal.SIGUSR1 and requeue()
    how = "it is back in the queue" if again else "the same command resumes it"
    say(f"Stopped by a signal {when}, and saved: {how}.")
    raise SystemExit(128 + number)


def outlast_signals(worker: int = 0) -> None:
    """Have a process that loads data go on after a signal that all processes of a job get, by a Ctrl-C or from SLURM:
    those that train still need data for their last steps. A `worker_init_fn` of a DataLoader.

    It ends at a SIGTERM of the process that trains. What it starts itself inherits that SIGTERM is blocked. Where the
    sender cannot be told (macOS), it ends at any SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_at_sigterm_of, args=(parent.pid,), daemon=True).start()


def _end_at_sigterm_of(process: int | None) -> None:
    """torch sends it to what still loads when the run is over."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)
