"""How far two calls raise the peak of memory: of the process on a CPU, of PyTorch's allocator on a GPU."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch


def peak_of(call: Callable[[], object], device: str) -> int:
    """In bytes. On a CPU, in a process that has done nothing else."""
    if device == "cuda":
        free()
    reset_peak(device)  # building the model may have had its own
    before = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    call()
    call()
    return peak(device) - before


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """The highest since `reset_peak`, in bytes."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def free() -> None:
    """Return a GPU's memory that the case before held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak), in bytes. `getrusage` would not do: a new process inherits its parent's peak."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024
