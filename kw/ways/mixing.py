"""Mixing cells into kernels, block by block, and the gradients of it.

A mixture is a product of attentions `(M, n)` with cells as a matrix `(n, W)`, taken some columns at a time so that what
goes in and comes out stays in the processor's cache. The columns are copied together first: rows of cells are often a
power of two apart and so compete for the same places of the cache. Buffers are used again and again: memory that is
new costs a page fault every 4 KiB, as much as computing what goes there.

Shapes: `b` samples of a block; `P` taps, `R = C_out / o` and `C = C_in / i` cells across; `n` cells of `o` by `i`, of
which a block has `r` rows each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kw.ways.product import product

COLUMNS = 16384
COLUMNS_GPU = 1 << 20


class Mixer:
    """Assembles the kernels of one block after another; each overwrites the one before.

    Args:
        grid: `(P, R, C)`.
        entries: of the largest block.
        like: gives type and device.
    """

    def __init__(self, grid: tuple[int, int, int], entries: int, like: Tensor):
        self.grid = grid
        self._kernels = like.new_empty(entries)
        self._columns = COLUMNS if like.device.type == "cpu" else COLUMNS_GPU

    def kernels(self, alpha: Tensor, cells: Tensor) -> Tensor:
        """`(b, m, n)` and some rows of cells `(n, r, i)` to `(b, R * r, P * C * i)`: input channels last, so that
        mixtures are put in place by moving runs of `i` numbers."""
        P, R, C = self.grid
        n, r, i = cells.shape
        kernels = self.buffer(len(alpha), cells)
        by_mixture = kernels.view(-1, R, r, P, C, i).permute(0, 3, 1, 4, 2, 5)
        for some in self._pieces(cells):
            mixtures = product(alpha.reshape(-1, n), cells[:, some].flatten(1))
            by_mixture[..., some, :] = mixtures.view(-1, P, R, C, mixtures.shape[1] // i, i)
        return kernels

    def buffer(self, samples: int, cells: Tensor) -> Tensor:
        """Where a block's kernels are, and where their gradient may be put."""
        P, R, C = self.grid
        r, i = cells.shape[1:]
        return self._kernels[: samples * P * R * C * r * i].view(samples, R * r, P * C * i)

    def add_gradients(
        self, grad: Tensor, alpha: Tensor, cells: Tensor, grad_alpha: Tensor | None, grad_cells: Tensor | None
    ) -> None:
        """From the gradient of `kernels(alpha, cells)`, add to those of the two that are wanted."""
        P, R, C = self.grid
        n, r, i = cells.shape
        alpha = alpha.reshape(-1, n)
        by_mixture = grad.view(-1, R, r, P, C, i).permute(0, 3, 1, 4, 2, 5)
        for some in self._pieces(cells):
            piece = by_mixture[..., some, :].reshape(len(alpha), -1)
            if grad_alpha is not None:
                grad_alpha += product(piece, cells[:, some].flatten(1).t()).view_as(grad_alpha)
            if grad_cells is not None:
                _add_product(grad_cells[:, some].flatten(1), alpha.t(), piece)

    def _pieces(self, cells: Tensor) -> list[slice]:
        r, i = cells.shape[1:]
        rows = max(self._columns // i, 1)
        return [slice(start, start + rows) for start in range(0, r, rows)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
