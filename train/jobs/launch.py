"""From one process to many: torch's elastic launch around a function, each call of which is one process's part."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from train.jobs.errors import LaunchError, report

PR_SET_PDEATHSIG = 1


def launch(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    processes: int,
    nodes: int = 1,
    endpoint: str = "localhost:0",
    name: str | None = None,
) -> None:
    """Run `work(*arguments)` in `processes` new processes of each node, and wait for all.

    Args:
        endpoint: host:port where the launchers of several nodes meet; port 0 is a free one.
        name: what they know each other by; left out, one that no other launch has.

    Raises:
        LaunchError: a worker failed.
        SystemExit: a signal asked the workers to leave.
    """
    local = endpoint.startswith(("localhost", "127."))
    settings = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=name or uuid.uuid4().hex,
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
        elastic_launch(settings, _work)(work, arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 128:  # a worker that saved and left
            sys.exit(failure.exitcode)
        raise LaunchError(f"process {rank} of {processes * nodes} failed ({failure.exitcode})") from None
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


def _work(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What each worker runs. It dies with its launcher: an orphan would go on writing into the run folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        work(*arguments)
    except Exception as error:
        if lost_contact(error):  # because another one failed, and tells why
            print(f"process {os.environ.get('RANK')}: lost contact with the others", file=sys.stderr, flush=True)
        elif not report(error):
            traceback.print_exc()
        sys.exit(1)


def lost_contact(error: BaseException) -> bool:
    """Whether it is torch.distributed's, or gloo's, which has no class of its own but names its source file."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
