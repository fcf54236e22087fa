"""What the host has to know of every step, read from the device one step late, so that it never waits for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What a message about a step tells. Loss and norm stay on the device until somebody wants to read them."""

    number: int
    loss: Tensor  # (), on this process
    norm: Tensor  # (), of the gradients of all
    indices: list[Tensor]  # of this process's samples


class Watch:
    """Counts on their way from the device to the host, one tensor of them at a time.

    `put` begins to copy them, `take` gives them once they are there. A loop takes those of one step when it has queued
    the next one. It may have to wait for the first, but the device then has the second to do: it never runs dry. On a
    CPU the copy is there at once, and is taken as late.
    """

    def __init__(self) -> None:
        self._put: tuple[Tensor, torch.cuda.Event | None, Step | None] | None = None

    def put(self, counts: Tensor, step: Step | None = None) -> None:
        on_gpu = counts.is_cuda
        host = torch.empty_like(counts, device="cpu", pin_memory=on_gpu)  # the host waits for a copy to other memory
        host.copy_(counts, non_blocking=True)
        event = torch.cuda.Event() if on_gpu else None
        if event:
            event.record()
        self._put = host, event, step

    def take(self) -> tuple[list[int], Step | None] | None:
        """What was put last, or None if it was taken before."""
        if self._put is None:
            return None
        (host, event, step), self._put = self._put, None
        if event:
            event.synchronize()
        return host.tolist(), step
