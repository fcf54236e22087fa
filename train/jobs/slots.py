"""Shares of this machine: the GPUs or cores of each job when several jobs run at once (`hydra/launcher=local`).

submitit starts all jobs of a sweep at once. Each waits here until its share is free. A share is held by a lock on one
small file for each GPU or core. The system drops it when the process ends, however it ends. All sweeps of a user on
this machine see the same files, so two sweeps do not use one GPU twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from train.jobs.errors import ConfigError

GPUS = "KW_SWEEP_GPUS"  # the GPUs of the sweep, as in CUDA_VISIBLE_DEVICES, which submitit sets anew for its jobs
POLL_SECONDS = 0.5


def offer_gpus() -> None:
    """Called before a sweep starts: tell its jobs which GPUs there are."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ[GPUS] = ",".join(map(str, range(torch.cuda.device_count()))) if visible is None else visible


def are_needed() -> bool:
    """Whether this job is one of a sweep on this machine."""
    return GPUS in os.environ


@contextlib.contextmanager
def share(device: str, devices: int, workers: int | None) -> Iterator[str]:
    """A share of this machine in the block, once it is free: `devices` GPUs, or the cores for as many processes. The
    process must not have used CUDA before.

    Args:
        device: "cuda", "cpu" or "auto", as in runtime.device.
        workers: processes that load data for each device.

    Yields:
        What was taken, such as "gpu 0, 1" or "cores 0".

    Raises:
        ConfigError: there are fewer GPUs than asked for.
    """
    gpus = [name for name in os.environ.get(GPUS, "").split(",") if name] if device != "cpu" else []
    if gpus:
        if devices > len(gpus):
            raise ConfigError(f"runtime.devices={devices}: this machine has {len(gpus)} GPUs for the sweep.")
        with _taken("gpu", gpus, devices) as mine:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
            yield f"gpu {', '.join(mine)}"
        return
    threads = int(os.environ.get("OMP_NUM_THREADS", "1").partition(",")[0])
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    with _taken("core", cores, min(devices * (threads + (workers or 0)), len(cores))) as mine:
        torch.set_num_threads(threads)  # each job would take all cores
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that it starts
        yield f"cores {', '.join(mine)}"


@contextlib.contextmanager
def _taken(kind: str, names: list[str], count: int) -> Iterator[list[str]]:
    """Hold `count` of these in the block, waiting for them if need be."""
    folder = Path(tempfile.gettempdir(), f"kw-slots-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    while True:
        with ExitStack() as locks:
            # One job looks at a time. Else two that need two each could hold one each, for ever.
            with _locked(folder / "looking", wait=True):
                mine: list[str] = []
                for name in names:
                    if len(mine) < count:
                        with contextlib.suppress(BlockingIOError):  # another job has it
                            locks.enter_context(_locked(folder / f"{kind}-{name}", wait=False))
                            mine.append(name)
            if len(mine) == count:
                yield mine
                return
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing leaves it to processes that were forked meanwhile
        os.close(descriptor)
