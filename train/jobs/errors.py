"""Errors and warnings for the user: each message names the key or file, and is printed without a traceback."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from train.jobs.torchrun import is_main


class RunError(RuntimeError):
    """The job cannot continue. If `everywhere` is True, every rank raises this error, and only rank 0 prints it."""

    everywhere = True


class ConfigError(RunError, ValueError):
    """A setting is unknown, missing or out of range; the message names its key."""


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
    """A worker process failed, and has printed why."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block, such as that of a full disk, into one that names the file.

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
    """Print a RunError in one line, without a traceback; return False for any other error."""
    if not isinstance(error, RunError):
        return False
    if not error.everywhere or is_main():
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return True


def without_trace(message: str) -> str:
    """The message of an error of a DataLoader's worker, without its stack trace, which would bury it."""
    said = re.search(r"^[\w.]*(?:DataError|\w+Image): (.*)", message, re.MULTILINE | re.DOTALL)
    return said[1].strip() if message.startswith("Caught ") and said else message


def warn(text: str) -> None:
    """Print a warning once, whatever the number of processes."""
    if is_main():
        print(f"Warning: {text}", file=sys.stderr, flush=True)
