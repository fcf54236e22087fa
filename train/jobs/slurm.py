"""SLURM: where the nodes of a job meet, and what a job asks for. `hydra/launcher=slurm` submits jobs through Hydra's
submitit launcher, with one task per node.

How a job is stopped and continues:

1. Some minutes before the time limit (hydra.launcher.signal_delay_s), SLURM sends SIGUSR1 to the job's processes.
   Before a preemption, and when the job is cancelled, it sends SIGTERM.
2. All ranks save and exit after the same step. If they returned instead, submitit would note the job as done.
3. At SIGUSR1, rank 0 puts the job back into the queue (`scontrol requeue`). At SIGTERM it does not: SLURM requeues what
   it preempts, and a cancelled job must stay cancelled.
4. The job starts again with the same overrides, so in the same run folder, and resume=auto continues from there.

Before training begins, submitit handles SIGUSR1 (the launcher's `setup` says so). It requeues the job too, but at most
hydra.launcher.max_num_timeout times, so that a job without progress comes to an end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from omegaconf import OmegaConf

FIRST_PORT, PORTS = 15000, 15000  # below those that systems give to outgoing connections


def rendezvous(environ: Mapping[str, str]) -> tuple[str, str]:
    """Where a job's nodes meet, and by which name: ("first-host:port", id), the same on every node. The port follows
    from the job's number, so that two jobs on one host do not share it; the id changes whenever the job is requeued.

    Raises:
        KeyError: this is not a SLURM job.
    """
    job = environ["SLURM_JOB_ID"]  # every task of an array has one
    port = FIRST_PORT + int(job) % PORTS
    return f"{first_host(environ['SLURM_JOB_NODELIST'])}:{port}", f"{job}.{environ.get('SLURM_RESTART_COUNT', 0)}"


def first_host(nodes: str) -> str:
    """`node[07-09,12],other` -> `node07`; also several brackets, `rack[1-2]node[3,5]`.

    Raises:
        ValueError: it is not a list of nodes.
    """
    entry = re.match(r"([^,\[\]]|\[[^\[\]]+\])+(?=,|$)", nodes)
    if entry is None:
        raise ValueError(f"SLURM_JOB_NODELIST={nodes!r} is not a list of nodes.")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", entry[0])


def in_submitit(environ: Mapping[str, str]) -> bool:
    """Whether submitit has started this process, on a cluster or here (`hydra/launcher=submitit_local`)."""
    return "SUBMITIT_EXECUTOR" in environ


def gpus_per_node(device: str, devices: int) -> int | None:
    return None if device == "cpu" else devices


def cpus_per_task(workers: int | None, devices: int) -> int:
    """CPUs of a node: for each device one process, and those that load its data (None: as MMDetection's file says,
    which is usually 2)."""
    return devices * ((2 if workers is None else workers) + 1)


# For configs/hydra/launcher/slurm.yaml.
OmegaConf.register_new_resolver("slurm_gpus", gpus_per_node, replace=True)
OmegaConf.register_new_resolver("slurm_cpus", cpus_per_task, replace=True)
