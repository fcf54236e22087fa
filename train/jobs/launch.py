"""From one process to many: torch's elastic launch around a function, which every worker process calls."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, cast

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from train.jobs.errors import ConfigError, LaunchError, report
from train.jobs.settings import Runtime
from train.jobs.signals import SIGNALS
from train.jobs.slurm import rendezvous
from train.jobs.torchrun import under_torchrun

PR_SET_PDEATHSIG = 1


def launch(work: Callable[..., None], arguments: tuple[Any, ...], runtime: Runtime, name: str) -> None:
    """Run `work(*arguments)`: here, if the job has one process or if torchrun has started this one; else in
    `runtime.devices` new processes.

    With `runtime.nodes` > 1 the same command runs on every node, and the nodes meet at `runtime.rendezvous`.

    Args:
        name: by which the nodes of one job know each other; no slashes, since torch makes a folder of it.

    Raises:
        LaunchError: a worker failed. Errors of a job that runs here are raised unchanged.
        ConfigError: the nodes have no meeting point.
        SystemExit: a signal asked the workers to leave.
    """
    if under_torchrun() or runtime.devices * runtime.nodes == 1:
        work(*arguments)
    else:
        start_workers(work, arguments, runtime, *meeting_point(runtime, name))


def count_processes(runtime: Runtime, typed: Sequence[str] = ()) -> None:
    """Under torchrun, set `devices` and `nodes` to the processes that it has started, for config.yaml to say.

    Args:
        typed: the keys of the command line. A number that was not typed is the default.

    Raises:
        ConfigError: the user has set them to other numbers.
    """
    if not under_torchrun():
        return
    world = int(os.environ["WORLD_SIZE"])
    asked = runtime.devices * runtime.nodes
    if asked != world and (asked > 1 or {"runtime.devices", "runtime.nodes"} & set(typed)):
        raise ConfigError(
            f"runtime.devices={runtime.devices} and runtime.nodes={runtime.nodes} make {asked} processes, but torchrun "
            f"has started {world}: leave both settings out."
        )
    runtime.devices = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    runtime.nodes = max(world // runtime.devices, 1)


def meeting_point(runtime: Runtime, name: str) -> tuple[str, str]:
    """Where the launchers of a job's nodes meet, as host:port, and the name that they know each other by.

    Raises:
        ConfigError: there are several nodes, and neither the user nor SLURM says where.
    """
    if runtime.nodes == 1:
        return runtime.rendezvous or "localhost:0", uuid.uuid4().hex
    if runtime.rendezvous:
        return runtime.rendezvous, name
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(f"runtime.nodes={runtime.nodes}: where do they meet? runtime.rendezvous=FIRST_NODE:PORT.")
    return rendezvous(os.environ)


def start_workers(
    work: Callable[..., None], arguments: tuple[Any, ...], runtime: Runtime, endpoint: str, name: str
) -> None:
    """Run `work(*arguments)` in new processes of this node, and wait for them.

    Args:
        endpoint: host:port where the launchers of several nodes meet; port 0 is a free one.

    Raises:
        LaunchError: a worker failed.
        SystemExit: a signal asked the workers to leave.
    """
    settings = LaunchConfig(
        min_nodes=runtime.nodes,
        max_nodes=runtime.nodes,
        nproc_per_node=runtime.devices,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=0,  # a run continues from its checkpoint, by the same command
        monitor_interval=0.2,
        local_addr="localhost" if endpoint.startswith(("localhost", "127.")) else None,
        signals_to_handle="SIGHUP,SIGQUIT",  # as torch does: pass them on, and kill after 30 seconds
    )
    silence()
    with PassedOn() as signals:
        try:
            elastic_launch(settings, _work)(work, arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if signals.first or failure.exitcode > 128:  # a worker that saved and left
                sys.exit(128 + signals.first if signals.first else failure.exitcode)
            processes = runtime.devices * runtime.nodes
            raise LaunchError(f"process {rank} of {processes} failed ({failure.exitcode})") from None
        except SignalException as error:
            sys.exit(128 + error.sigval)


class PassedOn:
    """In a `with` block, the launcher passes SIGNALS on to its workers, and waits until they have saved and left,
    however long that takes: torch's launcher would kill them after 30 seconds. At a second Ctrl-C it kills them.

    Attributes:
        first: the number of the first signal, or 0.
    """

    def __init__(self) -> None:
        self.first = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> PassedOn:
        self._before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        workers = multiprocessing.active_children()
        if not workers and not self.first:
            self._without_workers(number, frame)
        again = number == self.first == signal.SIGINT
        self.first = self.first or number
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(cast(int, worker.pid), signal.SIGKILL if again else number)

    def _without_workers(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if callable(before):  # Python's for Ctrl-C, submitit's for a time limit
            before(number, frame)
        raise SystemExit(128 + number)


LAUNCHERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")


def silence() -> None:
    """Turn the launcher's own log off: workers print their errors, and its report of dead workers would bury them."""
    for name in list(logging.root.manager.loggerDict):  # each by itself, as torch sets the level of each
        if name.startswith(LAUNCHERS):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _work(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What each worker runs. It is killed with its launcher: otherwise it would keep writing into the run folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        work(*arguments)
    except KeyboardInterrupt:  # before the training that would save, or after it has saved
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if lost_contact(error):  # because another process failed, and prints why
            print(f"process {os.environ.get('RANK')}: lost contact with the others", file=sys.stderr, flush=True)
        elif not report(error):
            traceback.print_exc()
        sys.exit(1)


def lost_contact(error: BaseException) -> bool:
    """Whether an error comes from torch.distributed or gloo. gloo raises RuntimeError, and names its source file."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
