"""Errors whose message says all that a user needs: they are printed without a traceback."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


class RunError(RuntimeError):
    """The job cannot go on. `everywhere` says whether all of its processes meet the same fault, so that one tells."""

    everywhere = True


class ConfigError(RunError, ValueError):
    """A setting is unknown, missing or has no sense; the message names its key."""


class CheckpointError(RunError):
    """A checkpoint cannot be written or read, or does not fit; the message names the file."""


class WriteError(RunError):
    """A file of the run folder cannot be written; the message names it."""

    everywhere = False


class DataError(RunError):
    """A file of the data cannot be read; the message names it."""

    everywhere = False


class NonFiniteError(RunError):
    """Loss or gradients are not finite; the message names step, samples and the last good checkpoint."""


class LaunchError(RunError):
    """A worker process failed, and has said why itself."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Work within that fails as a full disk or a read-only folder does is told of with the file's name.

    Raises:
        WriteError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} could not be written: {error.strerror or error}.") from error


def check(holds: bool, key: str, value: object, rule: str) -> None:
    """Raises ConfigError if the key's value breaks the rule."""
    if not holds:
        raise ConfigError(f"{key}={value!r}: {rule}.")


def check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    check(value in choices, key, value, f"must be one of {', '.join(choices)}")


def report(error: BaseException) -> bool:
    """Print an error whose message says it all, without the traceback that would bury it; False for any other.

    All processes find the same fault in a configuration, and the first one tells.
    """
    if not isinstance(error, RunError):
        return False
    if not error.everywhere or os.environ.get("RANK", "0") == "0":
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return True
