"""What the host must know of every step, read one step late, so that it never waits for an idle device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What an error message says of a step. Loss and norm stay on the device unless there is an error."""

    number: int
    loss: Tensor  # (), on this process
    norm: Tensor  # (), of the global gradient
    indices: list[Tensor]  # of this process's samples


class Watch:
    """An asynchronous copy of a small tensor of counts from the device to the host, one at a time.

    `put` starts the copy, `take` waits for it. A loop takes the counts of one step when it has queued the next step:
    then the device has work while the host waits. On a CPU the copy is done at once, and is taken as late.
    """

    def __init__(self) -> None:
        self._put: tuple[Tensor, torch.cuda.Event | None, Step | None] | None = None

    def put(self, counts: Tensor, step: Step | None = None) -> None:
        on_gpu = counts.is_cuda
        host = torch.empty_like(counts, device="cpu", pin_memory=on_gpu)  # to other memory a copy is synchronous
        host.copy_(counts, non_blocking=True)
        event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if event:
            event.record()
        self._put = host, event, step

    def take(self) -> tuple[list[int], Step | None] | None:
        """What was put last, or None if it was taken already."""
        if self._put is None:
            return None
        (host, event, step), self._put = self._put, None
        if event:
            event.synchronize()
        return host.tolist(), step
