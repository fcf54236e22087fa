"""What a SLURM job knows of itself, and how it goes on after it was stopped. Jobs are submitted by
`hydra/launcher=slurm`: Hydra's submitit launcher, one task per node.

Stop and go on:

1. Some minutes before the time limit (hydra.launcher.signal_delay_s) SLURM sends SIGUSR1 to the job's processes;
   before a preemption, and when it is cancelled, SIGTERM.
2. All processes save and leave after the same step. They exit instead of returning, or submitit would note that the job
   is done.
3. At SIGUSR1 the first process has the job queued again (`scontrol requeue`). At SIGTERM it does not: SLURM itself
   requeues what it preempts, and what was cancelled is to stay so.
4. The job starts again with the same overrides, so in the same run folder, and resume=auto goes on from there.

While a job has not come to train yet, submitit's own handler is at SIGUSR1 (the launcher's `setup` says so): it
requeues too, but at most hydra.launcher.max_num_timeout times, so that a job without progress comes to an end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 15000, 15000  # below those that systems give to outgoing connections


def rendezvous(environ: Mapping[str, str]) -> tuple[str, str]:
    """Where a job's nodes meet, and under which name: ("first-host:port", id), the same on every node. The port
    follows from the job, so that two jobs on one host do not share it; the id also from how often it was requeued.

    Raises:
        KeyError: this is no SLURM job.
    """
    job = environ["SLURM_JOB_ID"]  # of an array's task, its own
    port = FIRST_PORT + int(job) % PORTS
    return f"{first_host(environ['SLURM_JOB_NODELIST'])}:{port}", f"{job}.{environ.get('SLURM_RESTART_COUNT', 0)}"


def first_host(nodes: str) -> str:
    """`node[07-09,12],other` -> `node07`; also several brackets, `rack[1-2]node[3,5]`.

    Raises:
        ValueError: it is no list of nodes.
    """
    entry = re.match(r"([^,\[\]]|\[[^\[\]]+\])+(?=,|$)", nodes)
    if entry is None:
        raise ValueError(f"SLURM_JOB_NODELIST={nodes!r} is no list of nodes.")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", entry[0])


def in_submitit(environ: Mapping[str, str]) -> bool:
    """Whether this process was started by submitit, on a cluster or here (`hydra/launcher=submitit_local`)."""
    return "SUBMITIT_EXECUTOR" in environ


def gpus_per_node(device: str, devices: int) -> int | None:
    return None if device == "cpu" else devices


def cpus_per_task(workers: int, devices: int) -> int:
    """A task is a node's: for each device its process and those that load its data."""
    return devices * (workers + 1)
