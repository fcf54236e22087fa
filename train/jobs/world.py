"""One process or many: who this process is, and sums over all of them. Collectives of one process do nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config import RuntimeConfig
from train.jobs.errors import ConfigError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def place(self, values: Sequence[int]) -> Tensor:
        """Whole numbers on the device. From pinned memory: for a copy from other memory the host would wait."""
        pin = self.device.type == "cuda"
        return torch.tensor(values, dtype=torch.int32, pin_memory=pin).to(self.device, non_blocking=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; exact counts need whole numbers or float64."""
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

    def share_buffers(self, model: nn.Module) -> None:
        """The first process's buffers to all: running statistics are its own, until it is evaluated or saved."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def connect(runtime: RuntimeConfig) -> World:
    """The world as a launcher's environment describes it (RANK, WORLD_SIZE, LOCAL_RANK), or a world of one.

    Raises:
        ConfigError: runtime.device=cuda without a GPU, or with fewer than there are processes.
    """
    kind = runtime.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise ConfigError(f"runtime.device=cuda: process {local} of this node finds {torch.cuda.device_count()} GPUs.")
    if runtime.sync_norm and kind == "cpu":
        raise ConfigError("runtime.sync_norm=true needs GPUs: torch synchronizes batch statistics there alone.")
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return World(0, 1, device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), device)


SETTLE = 0.5  # seconds


def disconnect() -> None:
    """Leave the world; of one process, nothing.

    The thread that did gloo's last collective takes Python's lock to let go of its tensors. DDP's reducer destroys the
    group with that lock held, and joins the thread: had it not let go yet, as where an error follows a collective at
    once, both would wait for ever (torch 2.11). Asleep, this thread leaves it the lock.
    """
    if dist.is_initialized():
        time.sleep(SETTLE)
        dist.destroy_process_group()
