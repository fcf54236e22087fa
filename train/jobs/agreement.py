"""What the processes of one job find once for all of a node, and what they must find alike."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from train.jobs.errors import ConfigError, RunError
from train.jobs.world import World

T = TypeVar("T")


def once_per_node(world: World, make: Callable[[], T]) -> T:
    """What `make()` returns, which only the first process of each node calls: the others read it from a temporary file.
    A collective.

    Args:
        make: returns something that can be pickled, such as the list of a folder's images.

    Raises:
        RunError: of any node's `make`. All processes raise it, so that the first one prints it.
    """
    if world.size == 1:
        return make()
    host, leads = socket.gethostname(), os.environ.get("LOCAL_RANK", "0") == "0"
    made, kept, failure = _make(make) if leads else ([], None, None)
    try:
        for _, _, failed in (found := world.gather((host, kept, failure))):
            if failed is not None:
                failed.everywhere = True
                raise failed
        value = made[0] if made else _read([path for place, path, _ in found if place == host and path], make)
        world.barrier()
        return value
    finally:
        if kept is not None:
            kept.unlink(missing_ok=True)


def _make(make: Callable[[], T]) -> tuple[list[T], Path | None, RunError | None]:
    """The value, if it could be made; the file that it is kept in; and the error if it could not."""
    try:
        value = make()
    except RunError as error:
        return [], None, error
    return [value], _keep(value), None


def _keep(value: Any) -> Path | None:
    """A new file, which only this user can read or write, with the value; None where there is no place for it."""
    path = None
    try:
        handle, name = tempfile.mkstemp(prefix="kernelwarehouse-")
        path = Path(name)
        with os.fdopen(handle, "wb") as file:
            pickle.dump(value, file, protocol=pickle.HIGHEST_PROTOCOL)
        return path
    except OSError:
        if path is not None:
            path.unlink(missing_ok=True)
        return None


def _read(paths: list[Path], make: Callable[[], T]) -> T:
    """The value that the node's first process has kept or, where that failed, one of this process's own."""
    for path in paths:
        try:
            value: T = pickle.loads(path.read_bytes())
            return value
        except OSError:  # the temporary folders of two containers are not the same
            continue
    return make()


def agree(world: World, what: str, value: Any, remedy: str) -> None:
    """Check that all processes have the same value. A collective.

    Args:
        what: the value's name, for the message.
        remedy: a sentence of the message.

    Raises:
        ConfigError: they have not; all processes raise it.
    """
    values = world.gather(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ConfigError(f"Process {rank} has {what} {other}, but process 0 has {values[0]}. {remedy}")
