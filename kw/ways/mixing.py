"""Mixing cells into a block's kernels, and the gradients of it.

All mixtures of a block are one matrix product: attentions `(b * m, n)` with some rows of all cells, `(n, r * i)`. The
rows of a cell are copied together first, as the libraries are slow on matrices with gaps between their rows. Buffers
are used again from block to block: new memory costs a page fault every 4 KiB, as much as computing what goes there.

Shapes: `b` samples of a block; `P` taps, `R = C_out / o` and `C = C_in / groups / i` cells across, `m = P * R * C`
mixtures; `n` cells of `o` by `i`, `r` rows of each in a block.
"""

from __future__ import annotations

from torch import Tensor

from kw.ways.product import PerSample, pieces, product


class Mixer:
    """Assembles the kernels of one block after another; each overwrites the one before.

    Args:
        grid: `(P, R, C)`.
        entries: of the largest block.
        like: gives type and device.
    """

    def __init__(self, grid: tuple[int, int, int], entries: int, like: Tensor):
        self.grid = grid
        self._kernels, self._gradients = like.new_empty(entries), like.new_empty(entries)

    def kernels(self, alpha: Tensor, cells: Tensor) -> Tensor:
        """`(b, m, n)` and some rows of cells `(n, r, i)` to `(b, R * r, P * C * i)`: input channels last, so that
        mixtures are put in place by moving runs of `i` numbers."""
        P, R, C = self.grid
        n, r, i = cells.shape
        mixtures = product(alpha.reshape(-1, n), cells.flatten(1)).view(-1, P, R, C, r, i)
        if P * C == 1:  # in place already
            return mixtures.view(-1, R * r, i)
        kernels = self._kernels[: mixtures.numel()].view(-1, R, r, P, C, i)
        kernels.copy_(mixtures.permute(0, 2, 4, 1, 3, 5))
        return kernels.view(-1, R * r, P * C * i)

    def by_mixture(self, kernels: PerSample, rows: int) -> Tensor:
        """The way back, `(b, R * r, P * C * i)` to `(b * m, r * i)`, for gradients."""
        P, R, C = self.grid
        if P * C == 1 and isinstance(kernels, Tensor):
            return kernels.reshape(len(kernels) * R, -1)
        mixtures = self._gradients[: len(kernels) * kernels[0].numel()].view(len(kernels), P, R, C, rows, -1)
        for which, kernel in pieces(kernels):
            mixtures[which] = kernel.view(len(kernel), R, rows, P, C, -1).permute(0, 3, 1, 4, 2, 5)
        return mixtures.view(len(kernels) * P * R * C, -1)
