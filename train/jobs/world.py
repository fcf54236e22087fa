"""The process group: rank, size, device, and collectives, which do nothing if there is one process."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.jobs.errors import ConfigError
from train.jobs.settings import Runtime
from train.jobs.torchrun import under_torchrun

# How long a process waits for others, such as for the one that lists the images of a slow disk (NCCL's default is ten
# minutes). It does not wait for one that has died: then the launcher ends all.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The GPU's name, or cpu."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def place(self, values: Sequence[int]) -> Tensor:
        """Integers on the device, copied from pinned memory: for a copy from other memory the host would wait."""
        pin = self.device.type == "cuda"
        return torch.tensor(values, dtype=torch.int32, pin_memory=pin).to(self.device, non_blocking=True)

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce in place; exact counts need integers or float64."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def stack(self, values: Tensor) -> Tensor:
        """Every process's values, `(size, *shape)`."""
        if self.size == 1:
            return values[None].clone()
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, of any type that can be pickled."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Broadcast the buffers of rank 0. Between evaluations every rank keeps its own running statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def connect(runtime: Runtime) -> World:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK), or none if this is the only
    process.

    Raises:
        ConfigError: runtime.device=cuda, but this process has no GPU.
    """
    kind = runtime.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise ConfigError(f"runtime.device=cuda: process {local} of this node finds {torch.cuda.device_count()} GPUs.")
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if not under_torchrun():
        return World(0, 1, device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), device)


SETTLE = 0.5  # seconds


def disconnect() -> None:
    """Leave the process group, if there is one.

    After gloo's last collective, gloo's thread takes the GIL to release its tensors. The destructor of DDP's reducer
    destroys the group while it holds the GIL, and joins that thread. If the thread has not released its tensors yet,
    for example because an error follows the collective at once, both wait for ever (torch 2.11). This sleep lets the
    thread have the GIL first. A barrier could not take its place: after an error the other ranks may never reach it.
    """
    if dist.is_initialized():
        time.sleep(SETTLE)
        dist.destroy_process_group()
