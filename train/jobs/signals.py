"""Leaving well: signals that ask to save and go."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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
