"""One process or many: who this process is, and sums over all of them. Collectives of one process do nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.config import ConfigError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; exact counts need whole numbers or float64."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def connect(device: str) -> World:
    """The world as the launcher's environment describes it (RANK, WORLD_SIZE, LOCAL_RANK), or a world of one.

    Raises:
        ConfigError: runtime.device=cuda without a GPU, or with fewer than there are processes.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    local = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise ConfigError(f"runtime.device=cuda: process {local} finds {torch.cuda.device_count()} GPUs here.")
    place = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: training in several processes is not there yet.")
    return World(0, 1, place)


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
