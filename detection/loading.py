"""MMEngine's own checkpoints (resume, load_from, test) read without running what is in them.

MMEngine tries `weights_only=True`, and on an error unpickles anything. It takes its loaders from a table by the
path's beginning; ours take the places of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from numpy._core import multiarray

from detection.pretrained import read_weights
from train.jobs.checkpoint import read
from train.jobs.errors import CheckpointError


def method_of_history(owner: type, name: str) -> Callable[..., Any]:
    """What `getattr` may do in a pickle: name a statistic of HistoryBuffer, which is how MMEngine saves its logs."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise ValueError(f"a checkpoint asks for {name!r} of {owner!r}.")
    return getattr(HistoryBuffer, name)


# Beside tensors and plain values, MMEngine saves curves of logged values, in numpy's arrays.
ALLOWED = (
    HistoryBuffer,
    (method_of_history, "builtins.getattr"),
    slice,
    np.ndarray,
    np.dtype,
    multiarray._reconstruct,
    multiarray.scalar,
    *{type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "uint32", "bool")},
)


def load(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A checkpoint, as MMEngine's loaders give it.

    Raises:
        CheckpointError: the file is missing, damaged, or asks for more than `ALLOWED`.
    """
    path = Path(filename).expanduser()
    return read_weights(path) if path.suffix == ".safetensors" else read(path, ALLOWED)


def load_from_elsewhere(filename: str, map_location: Any = None) -> dict[str, Any]:
    raise CheckpointError(f"{filename}: checkpoints are read from files here. Download it, and name the file.")


def install() -> None:
    """Put ours in the places of MMEngine's loaders."""
    for prefix in CheckpointLoader._schemes:
        CheckpointLoader.register_scheme(prefix, load if prefix == "" else load_from_elsewhere, force=True)
