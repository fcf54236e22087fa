"""Implementation "batched": assemble every sample's kernel and multiply it with the sample's unfolded input, in one
batched matrix product. It uses only operations that every device, compiler and exporter supports, with sizes that may
vary, so it also computes what is recorded (tracing.py).

An unfolded input has a row for each channel at each tap (position of the kernel), with the values that the output
positions read there: P times the numbers of the input. Pointwise and linear layers have one tap and unfold nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from kw.compute import stand_in
from kw.compute.geometry import Geometry, channels_last, in_layout_of
from kw.compute.grouped import assemble
from kw.compute.tracing import is_recorded


def forward(x: Tensor, weights: Tensor, basis: Tensor, geometry: Geometry) -> Tensor:
    return per_sample(x, assemble(weights, basis, geometry.grid), geometry)


def per_sample(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Convolve each sample of `x` `(B, C_in, *space)` with its kernel, `(B, C_out, *, *)` of `C_in / groups` times P
    numbers for an output channel."""
    if stand_in.applies(geometry):
        return stand_in.per_sample(x, kernels, geometry)
    batch, channels_out = kernels.shape[:2]
    kernels = kernels.flatten(2)
    # Counters of multiply-adds read traces, and count products alone.
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not traced and geometry.groups == x.shape[1] == channels_out:
        return _depthwise(x, kernels, geometry)
    groups = batch * geometry.groups
    kernels = kernels.reshape(groups, channels_out // geometry.groups, kernels.shape[2])
    taps = unfold(x, geometry)
    flat = taps.flatten(2)
    flat = flat.reshape(groups, kernels.shape[2], flat.shape[2])
    if not is_recorded(x.shape) and channels_last(x):
        out = torch.bmm(flat.transpose(1, 2), kernels.transpose(1, 2)).transpose(1, 2)
    else:
        out = torch.bmm(kernels, flat)
    return in_layout_of(x, out.reshape(batch, channels_out, *taps.shape[2:]))


def _depthwise(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """A sum over taps, with kernels `(B, C, P)`: an unfolded input would be P times as large as the output."""
    factors = kernels.reshape(*kernels.shape[:2], *(1,) * len(geometry.kernel_size), -1)
    products = (tap * factors[..., p] for p, tap in enumerate(_taps(x, geometry)))
    return in_layout_of(x, reduce(torch.add, products))


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """`(B, C_in, *space)` to `(B, C_in * P, *out)`. Like `F.unfold`, in any number of dimensions."""
    if geometry.is_pointwise:
        return x
    if is_recorded(x.shape):  # exporters support slices of varying sizes, but not `Tensor.unfold`
        return torch.stack(list(_taps(x, geometry)), dim=2).flatten(1, 2)
    geometry.out_size(tuple(x.shape[2:]))
    x = _padded(x, geometry)
    sizes = zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    for dim, (kernel, stride, dilation) in enumerate(sizes, start=2):
        x = x.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]  # (B, C_in, *out, *kernel_size)
    dims = len(geometry.kernel_size)
    return x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)).flatten(1, 1 + dims)


def _taps(x: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """For each tap the values that the output positions read: views `(B, C_in, *out)` of the padded input."""
    x = _padded(x, geometry)
    sizes = list(zip(x.shape[2:], geometry.kernel_size, geometry.stride, geometry.dilation, strict=True))
    # Ends are sums of sizes, without a division: exporters can then prove that they are within the input.
    spans = [size - dilation * (kernel - 1) for size, kernel, _, dilation in sizes]
    for tap in product(*map(range, geometry.kernel_size)):
        starts = [k * dilation for k, (*_, dilation) in zip(tap, sizes, strict=True)]
        read = [slice(at, at + span, size[2]) for at, span, size in zip(starts, spans, sizes, strict=True)]
        yield x[(slice(None), slice(None), *read)]


def _padded(x: Tensor, geometry: Geometry) -> Tensor:
    if not any(geometry.padding):
        return x
    return F.pad(x, [side for pad in reversed(geometry.padding) for side in (pad, pad)])
