"""A layout of inputs that turns a convolution into a few products of large matrices, without a copy for each tap.

A *tap* is one position of a kernel. At a tap, every output position reads one input position. Put the padded rows of an
image one after the other, as a *strip*. Then all output positions together read one run of the strip at a tap, and the
same run, shifted, at another tap. The zeros after a row also serve as those before the next one. Positions between the
rows are computed too, and dropped: with 3 x 3 taps, one in eight for images of 7 x 7.

With a stride of s, every s-th row and column form a separate strip, a *phase*. A tap reads from one phase.

Shapes: `B` batch, `C` channels, `L` length of a run. Strips are `(B, C, length)`, channels last in memory if the input
is. If the only tap reads the input itself (pointwise and linear layers), nothing is copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from kw.compute.geometry import Geometry, channels_last

Position = tuple[int, ...]


class Tap(NamedTuple):
    """The phase that a tap reads, and where its run begins in the phase's strip."""

    phase: Position
    start: int


@dataclass(frozen=True)
class Data:
    """Which rows, columns, ... of the input a phase has: every s-th from `first` on, `count` of them. In the strip they
    begin at position `at`."""

    first: Position
    count: Position
    at: Position


class Strips:
    """The layout for inputs `(B, C, *space)` of a geometry with `groups == 1`."""

    def __init__(self, space: tuple[int, ...], geometry: Geometry):
        self.space, self.out, self.stride = space, geometry.out_size(space), geometry.stride
        sizes = zip(space, geometry.padding, self.out, self.stride, strict=True)
        # Positions of the strip for one row: its data and the zeros after it, and at least the outputs.
        self.widths = tuple(math.ceil(max(x + pad, out * s) / s) for x, pad, out, s in sizes)
        inner = math.prod(self.widths[1:])
        self.run = self.out[0] * inner
        self.taps = [self._tap(at, geometry.dilation) for at in product(*map(range, geometry.kernel_size))]
        self.data = {tap.phase: self._data(tap.phase, geometry.padding) for tap in self.taps}
        last = max(tap.start for tap in self.taps)
        self.rows = max(
            self.out[0] + math.ceil(last / inner), *(data.at[0] + data.count[0] for data in self.data.values())
        )
        # Gradients of the input read the outputs' strip, from so far before the run to so far after it:
        spans = [(self._flat(data.at), data.count[0] * inner) for data in self.data.values()]
        self.before = max(0, *(last - start for start, _ in spans))
        self.after = max(0, *(start + length - self.run for start, length in spans))

    def lay(self, x: Tensor) -> dict[Position, Tensor]:
        """The strip of each phase that a tap reads."""
        if not channels_last(x):
            x = x.contiguous()
        shape = (self.rows, *self.widths[1:])
        if shape == self.space and max(self.stride) == 1:
            return {self.taps[0].phase: x.flatten(2)}
        strips = {}
        for phase, data in self.data.items():
            strip = zeros(x, x.shape[1], math.prod(shape))
            torch.unflatten(strip, 2, shape)[self._block(data.at, data.count)] = x[self._every(data)]
            strips[phase] = strip
        return strips

    def reads(self, strips: dict[Position, Tensor], tap: Tap) -> Tensor:
        """The input values that the outputs read at a tap: `(B, C, L)`, a view."""
        return strips[tap.phase][:, :, tap.start : tap.start + self.run]

    def lay_out(self, grad: Tensor) -> Tensor:
        """A gradient of the outputs, as a strip with zeros between rows, before and after."""
        if not channels_last(grad):
            grad = grad.contiguous()
        if not self.before and not self.after and self.tight:
            return grad.flatten(2)
        strip = zeros(grad, grad.shape[1], self.before + self.run + self.after)
        self.outputs(strip[:, :, self.before : self.before + self.run]).copy_(grad)
        return strip

    def outputs(self, run: Tensor) -> Tensor:
        """The outputs `(B, C, *out)` in a run; a view."""
        rows: Tensor = torch.unflatten(run, 2, (self.out[0], *self.widths[1:]))
        return rows[self._block((0,) * len(self.out), self.out)]

    @property
    def tight(self) -> bool:
        """Whether outputs fill their run, with no positions between rows."""
        return self.widths[1:] == self.out[1:]

    def grad_reads(self, strip: Tensor, tap: Tap) -> Tensor:
        """For each input of a phase, from the first on, the gradient of the output that reads it at a tap:
        `(B, C_out, inputs)`, a view of the outputs' strip."""
        data = self.data[tap.phase]
        start = self.before + self._flat(data.at) - tap.start
        return strip[:, :, start : start + data.count[0] * math.prod(self.widths[1:])]

    def empty_grads(self, x: Tensor, dtype: torch.dtype) -> dict[Position, Tensor]:
        """For each phase, uninitialized gradients of as many inputs as `grad_reads` has."""
        inner = math.prod(self.widths[1:])
        return {phase: empty(x, x.shape[1], data.count[0] * inner, dtype) for phase, data in self.data.items()}

    def put(self, grad_x: Tensor, grads: dict[Position, Tensor]) -> None:
        """Copy the gradients of the phases to their places in `grad_x`."""
        for phase, grad in grads.items():
            data = self.data[phase]
            rows = torch.unflatten(grad, 2, (data.count[0], *self.widths[1:]))
            grad_x[self._every(data)] = rows[self._block((0,) * len(data.count), data.count)]

    def _tap(self, at: Position, dilation: Position) -> Tap:
        reads = [k * d for k, d in zip(at, dilation, strict=True)]
        phase = tuple(read % s for read, s in zip(reads, self.stride, strict=True))
        return Tap(phase, self._flat(tuple(read // s for read, s in zip(reads, self.stride, strict=True))))

    def _data(self, phase: Position, padding: Position) -> Data:
        sizes = list(zip(self.space, phase, padding, self.stride, strict=True))
        first = tuple((a - pad) % s for _, a, pad, s in sizes)
        at = tuple((f + pad - a) // s for f, (_, a, pad, s) in zip(first, sizes, strict=True))
        count = tuple(max(0, math.ceil((x - f) / s)) for f, (x, _, _, s) in zip(first, sizes, strict=True))
        return Data(first, count, at)

    def _flat(self, position: Position) -> int:
        flat = 0
        for width, at in zip(self.widths, position, strict=True):
            flat = flat * width + at
        return flat

    def _every(self, data: Data) -> tuple[slice, ...]:
        """The index of a phase's positions in `(B, C, *space)`."""
        steps = (slice(first, None, s) for first, s in zip(data.first, self.stride, strict=True))
        return (slice(None), slice(None), *steps)

    def _block(self, at: Position, count: Position) -> tuple[slice, ...]:
        """The index of `count` positions of each dimension, from `at` on, in `(B, C, *positions)`."""
        return (slice(None), slice(None), *(slice(a, a + c) for a, c in zip(at, count, strict=True)))


def empty(like: Tensor, channels: int, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized `(B, channels, length)`, channels last in memory if `like` is; of its dtype, or of `dtype`."""
    if channels_last(like):
        return like.new_empty(len(like), length, channels, dtype=dtype).transpose(1, 2)
    return like.new_empty(len(like), channels, length, dtype=dtype)


def zeros(like: Tensor, channels: int, length: int) -> Tensor:
    return empty(like, channels, length).zero_()
