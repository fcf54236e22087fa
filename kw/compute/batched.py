"""Implementation "batched": assemble every sample's kernel and multiply it with the sample's unfolded input, in one
batched matrix product. It uses only operations that every device, compiler and exporter supports.

An unfolded input has a row for each channel at each tap (position of the kernel), with the values that the output
positions read there: P times the numbers of the input. Pointwise and linear layers have one tap and unfold nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kw.compute.geometry import Geometry
from kw.compute.grouped import assemble


def forward(x: Tensor, weights: Tensor, basis: Tensor, geometry: Geometry) -> Tensor:
    """For `groups == 1`."""
    kernels = assemble(weights, basis, geometry.grid).flatten(2)  # (B, C_out, C_in * P)
    out = torch.bmm(kernels, unfold(x, geometry))
    return torch.unflatten(out, 2, geometry.out_size(tuple(x.shape[2:])))


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """`(B, C_in, *space)` to `(B, C_in * P, S)`, for `S` output positions. Like `F.unfold`, in any number of
    dimensions."""
    if geometry.is_pointwise:
        return x.flatten(2)
    out = geometry.out_size(tuple(x.shape[2:]))
    x = F.pad(x, [side for pad in reversed(geometry.padding) for side in (pad, pad)])
    sizes = zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    for dim, (kernel, stride, dilation) in enumerate(sizes, start=2):
        x = x.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]  # (B, C_in, *out, *kernel_size)
    dims = len(out)
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.reshape(len(x), -1, math.prod(out))
