"""Assemble a block of the batch's kernels, apply it, forget it, and rebuild it in the backward pass.

A block is some rows of every cell, for all samples or, where that is too much, for some of them. It is small enough to
stay in a processor's cache, so the batch's kernels never exist at once. How a block is applied is the business of the
ways "convolve" (one convolution of the library a sample) and "multiply" (matrix products on the input's taps).

Shapes: `b` samples of a block; `P` taps, `R = C_out / o` and `C = C_in / groups / i` cells across; `n` cells of `o` by
`i`, `r` rows of each in a block; `S` output positions.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from kw.ways.mixing import Mixer
from kw.ways.product import PerSample, pieces, product
from kw.ways.task import Task

# Entries of assembled kernels at a time. On a CPU 28 MB: the usual allocator takes blocks above 32 MiB from the system
# each time anew, at the price of a page fault every 4 KiB. A GPU wants larger products.
ENTRIES = {"cpu": 7 << 20}
ENTRIES_ELSEWHERE = 1 << 26
ROWS = 64  # that a block should have at least: products of fewer rows are slow


class Applied(Protocol):
    """Some samples' input, to which block after block of their kernels is applied."""

    def __init__(self, x: Tensor, task: Task): ...

    def forward(self, kernels: Tensor) -> PerSample:
        """Kernels `(b, R * r, P * C * i)` to outputs `(b, R * r, S)`."""

    def backward(self, grad: Tensor, kernels: Tensor, needed: tuple[bool, bool]) -> PerSample | None:
        """From the gradient of `forward`, that of the kernels; that of the input is added to those before. Either may
        not be needed."""

    def grad_x(self) -> Tensor:
        """The gradient of the input, all blocks together."""


def forward(x: Tensor, alpha: Tensor, cells: Tensor, task: Task, way: type[Applied]) -> Tensor:
    out = task.empty_out(x, cells)
    by_cell = torch.unflatten(out.flatten(2), 1, (task.grid[1], -1))  # (B, R, o, S)
    mixer, samples, rows = _plan(x, cells, task)
    for part in samples:
        applied = way(x[part], task)
        for some in rows:
            y = applied.forward(mixer.kernels(alpha[part], cells[:, some].contiguous()))
            for which, one in pieces(y):
                by_cell[part, :, some][which] = torch.unflatten(one, 1, (task.grid[1], -1))
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    task: Task,
    needed: tuple[bool, bool, bool],
    way: type[Applied],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `x`, `alpha` and `cells` that are needed."""
    need_x, need_alpha, need_cells = needed
    grad_x = torch.empty_like(x) if need_x else None
    grad_alpha, grad_cells = _empty_sum(alpha, need_alpha), _empty_sum(cells, need_cells)
    by_cell = torch.unflatten(grad.flatten(2), 1, (task.grid[1], -1))  # (B, R, o, S)
    mixer, samples, rows = _plan(x, cells, task)
    for part in samples:
        applied = way(x[part], task)
        for some in rows:
            g = by_cell[part, :, some].flatten(1, 2)
            piece = cells[:, some].contiguous()
            kernels = mixer.kernels(alpha[part], piece)
            grad_kernels = applied.backward(g, kernels, (need_x, need_alpha or need_cells))
            if grad_kernels is None:
                continue
            by_mixture = mixer.by_mixture(grad_kernels, piece.shape[1])
            if grad_alpha is not None:
                of_alpha = product(by_mixture, piece.flatten(1).t())
                _put(grad_alpha[part], of_alpha, first=some is rows[0])
            if grad_cells is not None:
                of_cells = product(alpha[part].flatten(0, 1).t(), by_mixture)
                _put(grad_cells[:, some], of_cells, first=part is samples[0])
        if grad_x is not None:
            grad_x[part] = applied.grad_x()
    return (
        grad_x,
        None if grad_alpha is None else grad_alpha.to(alpha.dtype),
        None if grad_cells is None else grad_cells.to(cells.dtype),
    )


def cut(batch: int, mixtures: int, o: int, i: int, limit: int) -> tuple[int, int]:
    """Samples, and rows of each cell, of a block with about `limit` entries.

    Many samples rather than many rows: each cell is then read for all of them at once.
    """
    some = batch
    while some > 1 and some * mixtures * min(o, ROWS) * i > limit:
        some = (some + 1) // 2
    rows = min(max(limit // (some * mixtures * i), ROWS), o)
    return some, math.ceil(o / math.ceil(o / rows))  # of equal height


def _plan(x: Tensor, cells: Tensor, task: Task) -> tuple[Mixer, list[slice], list[slice]]:
    """Buffers of a block's size, the cuts of the batch, and those of a cell's rows."""
    _, o, i = cells.shape
    some, rows = cut(len(x), task.mixtures, o, i, ENTRIES.get(x.device.type, ENTRIES_ELSEWHERE))
    mixer = Mixer(task.grid, some * task.mixtures * rows * i, cells)
    return mixer, [slice(b, b + some) for b in range(0, len(x), some)], [slice(r, r + rows) for r in range(0, o, rows)]


def _empty_sum(x: Tensor, needed: bool) -> Tensor | None:
    """Where the gradients of `x` are added up block by block: in float32 at least, lest half precision lose them."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(x.shape, dtype=dtype, device=x.device) if needed else None


def _put(total: Tensor, value: Tensor, first: bool) -> None:
    """Add; the first time write, which saves filling large sums with zeros."""
    total.copy_(value.view(total.shape)) if first else total.add_(value.view(total.shape))
