"""Checkpoints read as plain tensors and values only: code hidden in a pickle is refused, not run."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

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
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {code[1]}, which was not run" if code else "its pickle cannot be read"
        raise CheckpointError(f"{path} is damaged, or holds more than tensors and plain values: {reason}.") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a checkpoint.") from None
    except (OSError, RuntimeError, EOFError, BadZipFile, ValueError, KeyError):  # with messages about torch's internals
        raise CheckpointError(f"{path} is damaged, cut off, or not a checkpoint.") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint.")
    return state
