"""One node in place of a convolution with a kernel for each sample, while a model is recorded for ONNX.

ONNX's Conv has a constant number of groups, so that "grouped" cannot be written with it, and an unfolded input takes
many operations and much memory. The node is recorded whole; `kw.export.onnx` writes a Conv for each sample in its place
(kw/export/per_sample.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kw.compute.geometry import Geometry

DOMAIN, NAME = "kw", "PerSample"
# Records a node of ONNX by name; from torch 2.8 on. Without it, "batched" is recorded.
_symbolic: Any = getattr(getattr(torch.onnx, "ops", None), "symbolic", None)
_is_used = False


@contextmanager
def recorded() -> Iterator[None]:
    """Within the block, what is recorded has the node."""
    global _is_used
    before, _is_used = _is_used, _symbolic is not None
    try:
        yield
    finally:
        _is_used = before


def is_used() -> bool:
    """Whether a model is recorded for ONNX."""
    return _is_used


def applies(geometry: Geometry) -> bool:
    """Whether the node is to be recorded: not for kernels of one position, which are matrices."""
    return _is_used and (set(geometry.kernel_size) != {1} or any(geometry.padding))


def per_sample(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """As `kw.compute.batched.per_sample`; recorded, not computed."""
    kernels = kernels.reshape(*kernels.shape[:2], x.shape[1] // geometry.groups, *geometry.kernel_size)
    settings = {
        "strides": geometry.stride,
        "pads": (*geometry.padding, *geometry.padding),
        "dilations": geometry.dilation,
        "group": geometry.groups,
    }
    shape = (x.shape[0], kernels.shape[1], *geometry.out_size(tuple(x.shape[2:])))
    out: Tensor = _symbolic(f"{DOMAIN}::{NAME}", (x, kernels), dict(settings), dtype=x.dtype, shape=shape, version=1)
    return out
