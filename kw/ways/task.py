"""What a layer asks of the ways: the cut of its kernel, and how the kernel is applied. And the taps of an input.

A *tap* is one spatial position of a kernel. At tap p, every output position reads one input position, so a convolution
is a matrix product with the taps side by side: `out[s] = sum over p of kernel[p] @ x[position that s reads at p]`.

Shapes: `B` batch, `P` kernel positions, `C` input channels, `S` output positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

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

    @property
    def has_one_tap(self) -> bool:
        """Whether the taps are the input itself, as for pointwise convolutions and linear layers."""
        return self.grid[0] == 1 and max(self.stride) == 1 and max(self.padding) == 0

    def out_size(self, space: tuple[int, ...]) -> tuple[int, ...]:
        sizes = zip(space, self.padding, self.dilation, self.kernel_size, self.stride, strict=True)
        return tuple((x + 2 * pad - d * (k - 1) - 1) // step + 1 for x, pad, d, k, step in sizes)

    def empty_out(self, x: Tensor, cells: Tensor) -> Tensor:
        """Where the output `(B, C_out, *out)` may be put: channels last where they are so in `x`."""
        channels, space = self.grid[1] * cells.shape[1], self.out_size(tuple(x.shape[2:]))
        if x.stride(1) == 1 and x.shape[1] > 1:
            return x.new_empty(len(x), *space, channels).movedim(-1, 1)
        return x.new_empty(len(x), channels, *space)

    def taps(self, x: Tensor) -> Tensor:
        """`(B, C, *space)` to `(B, S, P * C)`: a view where there is one tap, else a copy `P` times the input."""
        if self.has_one_tap:
            return x.flatten(2).transpose(1, 2)
        padded = self._padded(x)
        padded[self._interior(x)] = x.movedim(1, -1)
        out = self.out_size(tuple(x.shape[2:]))
        taps = x.new_empty(len(x), *out, self.grid[0], x.shape[1])
        for p, reads in enumerate(self._reads(out)):
            taps[..., p, :] = padded[reads]
        return taps.view(len(x), math.prod(out), -1)

    def untap(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of `taps`: `(B, S, P * C)` to the shape of `x`, what was read at several taps summed."""
        if self.has_one_tap:
            return grad.transpose(1, 2).view(x.shape)
        padded = self._padded(x)
        out = self.out_size(tuple(x.shape[2:]))
        grad = grad.view(len(x), *out, self.grid[0], x.shape[1])
        for p, reads in enumerate(self._reads(out)):
            padded[reads] += grad[..., p, :]
        return padded[self._interior(x)].movedim(-1, 1)

    def _padded(self, x: Tensor) -> Tensor:
        """Zeros for `x` and its padding, channels last."""
        space = (size + 2 * pad for size, pad in zip(x.shape[2:], self.padding, strict=True))
        return x.new_zeros(len(x), *space, x.shape[1])

    def _interior(self, x: Tensor) -> tuple[slice, ...]:
        return (slice(None), *(slice(pad, pad + size) for pad, size in zip(self.padding, x.shape[2:], strict=True)))

    def _reads(self, out: tuple[int, ...]) -> list[tuple[slice, ...]]:
        """Per tap, where the padded input is read."""
        return [
            (
                slice(None),
                *(
                    slice(at * dilation, at * dilation + (size - 1) * step + 1, step)
                    for at, dilation, step, size in zip(tap, self.dilation, self.stride, out, strict=True)
                ),
            )
            for tap in product(*map(range, self.kernel_size))
        ]
