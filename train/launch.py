"""From one command to one process or many: torch's elastic launch inside the Hydra job, or torchrun around it."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import traceback
import uuid
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from train.config import TrainConfig
from train.errors import ConfigError, LaunchError, RunError
from train.run import run
from train.slurm import rendezvous
from train.trainer import accumulation

PR_SET_PDEATHSIG = 1


def launch(config: TrainConfig, folder: Path) -> None:
    """Run the job: here, if it is one process or if torchrun has started this one; else in `runtime.devices` new ones.

    With `runtime.nodes` > 1 the same command runs on every node, and the nodes meet at `runtime.rendezvous`.

    Raises:
        LaunchError: a worker failed. Errors of a job that runs here come as they are.
        ConfigError: the batch cannot be shared out to the devices, or nobody says where nodes meet.
    """
    runtime = config.runtime
    devices = runtime.devices * runtime.nodes
    if "RANK" in os.environ or devices == 1:
        run(config, folder)
        return
    if config.evaluate is None:  # what can be told without them is told before workers start
        accumulation(config.recipe.batch_size, runtime.micro_batch, devices)
    endpoint, name = meeting_point(config)
    local = endpoint.startswith(("localhost", "127."))
    settings = LaunchConfig(
        min_nodes=runtime.nodes,
        max_nodes=runtime.nodes,
        nproc_per_node=runtime.devices,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=0,  # a checkpoint and the same command are how a run goes on
        monitor_interval=0.2,
        local_addr="localhost" if local else None,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # passed on to the workers
    )
    silence()
    before = signal.getsignal(signal.SIGUSR1)
    try:
        elastic_launch(settings, _work)(config, folder)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 128:  # a worker that saved and left
            sys.exit(failure.exitcode)
        raise LaunchError(f"process {rank} of {devices} failed ({failure.exitcode})") from None
    except SignalException as error:
        sys.exit(128 + error.sigval)
    finally:
        signal.signal(signal.SIGUSR1, before)


LAUNCHERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")


def silence() -> None:
    """Workers tell what went wrong with them; the launcher's account of their ends would bury it."""
    for name in list(logging.root.manager.loggerDict):  # each by itself, as torch gives them levels of their own
        if name.startswith(LAUNCHERS):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def meeting_point(config: TrainConfig) -> tuple[str, str]:
    """Where the nodes' launchers meet, and the name that they know each other by.

    Raises:
        ConfigError: there are several nodes, and nobody says where.
    """
    runtime = config.runtime
    if runtime.nodes == 1:
        return runtime.rendezvous or "localhost:0", uuid.uuid4().hex  # port 0: a free one
    if runtime.rendezvous:
        # without slashes, as torch makes a folder of it
        return runtime.rendezvous, f"{config.data.name}-{config.name}-seed{config.seed}"
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(f"runtime.nodes={runtime.nodes}: where do they meet? runtime.rendezvous=FIRST_NODE:PORT.")
    return rendezvous(os.environ)


def _work(config: TrainConfig, folder: Path) -> None:
    """What each worker runs. It dies with its launcher: an orphan would go on writing into the run folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        run(config, folder)
    except Exception as error:
        if lost_contact(error):  # because another one failed, and tells why
            print(f"process {os.environ.get('RANK')}: lost contact with the others", file=sys.stderr, flush=True)
        elif not report(error):
            traceback.print_exc()
        sys.exit(1)


def lost_contact(error: BaseException) -> bool:
    """Whether it is torch.distributed's, or gloo's, which has no class of its own but names its source file."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def report(error: BaseException) -> bool:
    """Print an error whose message says it all, without the traceback that would bury it; False for any other.

    All processes find the same fault in a configuration, and the first one tells.
    """
    if not isinstance(error, RunError):
        return False
    if not error.everywhere or os.environ.get("RANK", "0") == "0":
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return True
