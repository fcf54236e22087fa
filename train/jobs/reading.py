"""Checkpoints read as plain tensors and values only: code hidden in a pickle is refused, not run."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch

from train.jobs.errors import CheckpointError

FORMAT = "kernelwarehouse 1"  # under "format" in checkpoints of `python -m train`; others have no such key
# Training scripts like timm's save their arguments, which are plain values, next to the weights.
PLAIN = (argparse.Namespace,)


def read(path: Path, allowed: Sequence[Any] = ()) -> dict[str, Any]:
    """Read a checkpoint to the CPU with `weights_only=True`.

    Args:
        allowed: classes and functions that its pickle may use besides tensors and plain values.

    Raises:
        CheckpointError: the file is missing or damaged, or uses others.
    """
    try:
        with torch.serialization.safe_globals([*PLAIN, *allowed]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        damaged = damaged_part(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {code[1]}, which was not run" if code else "its pickle cannot be read"
        raise CheckpointError(f"{path} is damaged, or holds more than tensors and plain values: {reason}.") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a checkpoint.") from None
    except Exception:  # anything: torch reads what is not its own file as a pickle of before
        raise CheckpointError(f"{path} is damaged, cut off, or not a checkpoint.") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint.")
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not fit its content.")
    return state


def damaged_part(path: Path) -> str | None:
    """The first part of a file of torch.save whose content is not what was written. torch writes checksums, but does
    not compare them when it reads."""
    if not is_zipfile(path):  # as before torch 1.6
        return None
    with ZipFile(path) as file:
        return file.testzip()
