"""Safe checkpoint reading for `python -m detection`: nothing that a checkpoint holds is run, and nothing is downloaded.

MMEngine reads with `weights_only=True` first, and when that fails it unpickles anything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import get_torch_safe_globals
from safetensors import SafetensorError
from safetensors.torch import load_file

from train.jobs.errors import CheckpointError
from train.jobs.reading import read

# MMEngine tries its loaders' regular expressions in reverse alphabetical order, and takes the first that matches the
# beginning of the path. "~" sorts after all letters, and as it is optional, this one matches every path.
EVERY_PATH = "~?"


def history_method(owner: type, name: str) -> Callable[..., Any]:
    """`getattr` as far as a checkpoint may use it: HistoryBuffer, which holds MMEngine's logs, saves its methods so."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise ValueError(f"A checkpoint asks for the attribute {name!r} of {owner!r}.")
    return getattr(HistoryBuffer, name)


# What MMEngine saves besides tensors and plain values: logs, in numpy arrays. Its own list has the real getattr.
ALLOWED = (
    *(allowed for allowed in get_torch_safe_globals() if allowed is not getattr),
    (history_method, "builtins.getattr"),
    *(type(np.dtype(kind)) for kind in ("float32", "int32", "bool")),
)


def load(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint file to the CPU; a loader of MMEngine's.

    Raises:
        CheckpointError: it is not a file here, it is damaged, or its pickle asks for more than `ALLOWED`.
    """
    if "://" in filename:
        raise CheckpointError(f"{filename}: it is not a file. Download it, then give its path.")
    path = Path(filename).expanduser()
    if path.suffix != ".safetensors":
        return read(path, ALLOWED)
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None


def install() -> None:
    """Have MMEngine read all checkpoints of this process by `load`."""
    CheckpointLoader.register_scheme(EVERY_PATH, load, force=True)
