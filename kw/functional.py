"""Ways to compute one KernelWarehouse layer. All are exact; they differ in time and memory.

"grouped" is the plain definition: put every sample's kernel together, then one convolution in which each sample is a
group of its own. "matmul" serves kernels of one position (pointwise convolutions) by a batched matrix product on the
input as it lies in memory. "auto", the default, takes "matmul" where it applies, else "grouped".

Shapes: `B` batch, `m` mixtures, `n` cells, `o` by `i` channels of a cell, `P` kernel positions, `S` output positions.
"""

from __future__ import annotations

import math
from types import TracebackType

import torch
from torch import Tensor
from torch.nn import functional as F

WAYS = ("auto", "grouped", "matmul")
_way = "auto"

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class use:
    """Force a way of computing, for good (`use("grouped")`) or within a block (`with use("grouped"): ...`).

    A layer that the way does not apply to is computed by "grouped".

    Raises:
        ValueError: there is no such way.
    """

    def __init__(self, way: str):
        global _way
        if way not in WAYS:
            raise ValueError(f"There is no way {way!r} to compute a layer; there are {', '.join(WAYS)}.")
        self._previous, _way = _way, way

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _way
        _way = self._previous


def assemble(alpha: Tensor, cells: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Each sample's kernel from its attentions: `(B, m, n)` and `(n, o, i)` to `(B, C_out, C_in / groups, P)`.

    Mixture `(p, a, b)` of `grid = (P, C_out / o, C_in / i)` is the cell at position p, rows `a * o`, columns `b * i`.
    """
    n, o, i = cells.shape
    batch = alpha.shape[0]
    positions, rows, columns = grid
    mixtures = alpha.to(cells.dtype).reshape(-1, n) @ cells.view(n, o * i)  # (B * m, o * i)
    kernel = mixtures.view(batch, positions, rows, columns, o, i).permute(0, 2, 4, 3, 5, 1)
    return kernel.reshape(batch, rows * o, columns * i, positions)


def linear(x: Tensor, kernel: Tensor) -> Tensor:
    """`(B, *, C_in)` with one `(C_out, C_in)` kernel per sample to `(B, *, C_out)`."""
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    return torch.bmm(flat, kernel.transpose(1, 2)).view(*x.shape[:-1], kernel.shape[1])


def convolution(
    x: Tensor,
    kernel: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Convolve `(B, C_in, *space)` with one `(C_out, C_in / groups, *kernel_size)` kernel per sample."""
    if len(x) == 0:
        convolve = CONVOLUTIONS[x.dim() - 2]
        return convolve(x, kernel.sum(0), None, stride, padding, dilation, groups)
    unpadded = isinstance(padding, str) or not any(padding)  # "same" pads a pointwise kernel by nothing
    pointwise = math.prod(kernel.shape[3:]) == 1 and groups == 1 and unpadded
    if _way in ("auto", "matmul") and pointwise:
        return _matmul(x, kernel, stride)
    return _grouped(x, kernel, stride, padding, dilation, groups)


def _grouped(
    x: Tensor,
    kernel: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    batch, channels = x.shape[:2]
    convolve = CONVOLUTIONS[x.dim() - 2]
    wide = x.reshape(1, batch * channels, *x.shape[2:])
    out = convolve(wide, kernel.flatten(0, 1), None, stride, padding, dilation, batch * groups)
    return out.view(batch, kernel.shape[1], *out.shape[2:])


def _matmul(x: Tensor, kernel: Tensor, stride: tuple[int, ...]) -> Tensor:
    if any(step != 1 for step in stride):
        x = x[(slice(None), slice(None), *(slice(None, None, step) for step in stride))]
    out = torch.bmm(kernel.flatten(2), x.flatten(2))  # (B, C_out, C_in) @ (B, C_in, S)
    return out.view(x.shape[0], kernel.shape[1], *x.shape[2:])
