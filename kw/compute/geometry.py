"""The geometry of one convolution: how its kernel is cut into cells, and how it is applied.

Shapes: `B` batch, `P` kernel positions, `R` by `C` cells of a kernel at each position, `o` by `i` channels of a cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kw.compute.tracing import is_recorded

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """The geometry of one layer, made in its constructor. A linear layer is a convolution of one position.

    `grid` is `(P, R, C)` with `R = C_out / o` and `C = C_in / groups / i`: the kernel's cells in the order of its
    mixtures, the last index fastest. Where cells span all positions (`i` includes them), the grid's P is 1.
    """

    grid: Grid
    kernel_size: tuple[int, ...] = (1,)
    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    groups: int = 1

    @property
    def mixtures(self) -> int:
        return math.prod(self.grid)

    @property
    def spans_positions(self) -> bool:
        """Whether a cell is for several positions of the kernel."""
        return self.grid[0] != math.prod(self.kernel_size)

    @property
    def is_pointwise(self) -> bool:
        """Whether each output position reads only the same position of the input."""
        return self.groups == 1 and set((*self.kernel_size, *self.stride)) == {1} and not any(self.padding)

    def out_size(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """The output's spatial size for an input of size `space`. Raises ValueError if the kernel does not fit, unless
        the sizes are recorded for other inputs."""
        sizes = zip(space, self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        out = tuple((x + 2 * pad - d * (k - 1) - 1) // step + 1 for x, pad, d, k, step in sizes)
        if not is_recorded(space) and any(size < 1 for size in out):
            raise ValueError(
                f"An input of {space} positions, padded by {self.padding}, is too small for a kernel of "
                f"{self.kernel_size} at dilation {self.dilation}."
            )
        return out

    def empty_out(self, x: Tensor, cell_rows: int) -> Tensor:
        """Uninitialized output with `R * cell_rows` channels, in the memory format of `x`."""
        shape = (x.shape[0], self.grid[1] * cell_rows, *self.out_size(tuple(x.shape[2:])))
        return empty(x, shape)


def channels_last(x: Tensor) -> bool:
    """Whether the channels of `(B, C, *space)` are adjacent in memory, as in linear layers' inputs."""
    return x.stride(1) == 1 and x.shape[1] > 1


def in_layout_of(x: Tensor, out: Tensor) -> Tensor:
    """`out` `(B, C, *space)`, channels last in memory if `x` is, else contiguous. Compilers and exporters lay out
    memory themselves."""
    if torch.compiler.is_compiling() or is_recorded(x.shape):
        return out
    if not channels_last(x):
        return out.contiguous()
    return out.movedim(1, -1).contiguous().movedim(-1, 1)


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialized tensor of a shape `(B, C, *space)`: channels last if `like` is, else contiguous."""
    order = [0, *range(2, len(shape)), 1] if channels_last(like) else list(range(len(shape)))  # outermost first
    # It must not be a view: autograd would copy the gradient when the bias is added in place.
    return torch.empty_permuted(shape, order, dtype=like.dtype, device=like.device)


def empty_like(x: Tensor) -> Tensor:
    """Uninitialized gradient of `x` `(B, C, *space)`."""
    return empty(x, tuple(x.shape))
