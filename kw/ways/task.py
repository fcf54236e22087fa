"""What a layer asks of the ways: the cut of its kernel, and how the kernel is applied.

Shapes: `B` batch, `P` kernel positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One layer's convolution. A linear layer is one with a kernel of one position.

    `grid` is `(P, C_out / o, C_in / groups / i)`: the kernel's cells in the order of its mixtures, the last fastest.
    Where cells span all positions (`i` counts them in), the grid's P is 1.
    """

    grid: tuple[int, int, int]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def mixtures(self) -> int:
        return math.prod(self.grid)

    @property
    def spans_positions(self) -> bool:
        """Whether a cell is for several positions of the kernel."""
        return self.grid[0] != math.prod(self.kernel_size)

    def out_size(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Output positions, for input positions `space`. Raises ValueError if the kernel does not fit into them."""
        sizes = zip(space, self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        out = tuple((x + 2 * pad - d * (k - 1) - 1) // step + 1 for x, pad, d, k, step in sizes)
        if any(size < 1 for size in out):
            raise ValueError(
                f"An input of {space} positions, padded by {self.padding}, is too small for a kernel of "
                f"{self.kernel_size} at dilation {self.dilation}."
            )
        return out

    def empty_out(self, x: Tensor, cells: Tensor) -> Tensor:
        """Where the output `(B, C_out, *out)` may be put: channels last where they are so in `x`."""
        shape = (len(x), self.grid[1] * cells.shape[1], *self.out_size(tuple(x.shape[2:])))
        order = [0, *range(2, x.dim()), 1] if channels_last(x) else list(range(x.dim()))  # outermost in memory first
        # Not a view, for a bias is added in place.
        return torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)


def channels_last(x: Tensor) -> bool:
    """Whether the channels of `(B, C, *space)` lie together, as in linear layers' inputs."""
    return x.stride(1) == 1 and x.shape[1] > 1
