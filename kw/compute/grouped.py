"""Implementation "grouped", as in the release: assemble every sample's kernel, then one grouped convolution in which
each sample is a group. The reference for all others."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kw.compute import stand_in
from kw.compute.geometry import Geometry, Grid, in_layout_of
from kw.compute.mixing import mix

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def assemble(weights: Tensor, basis: Tensor, grid: Grid) -> Tensor:
    """Each sample's kernel, `(B, C_out, C_in / groups, P)`, from its weights `(B, m, J)` and the basis (mixing.py).

    Mixture `(p, a, b)` of `grid = (P, C_out / o, C_in / i)` is the cell at position p, row `a * o`, column `b * i`.
    """
    return assemble_mixtures(mix(weights.to(basis.dtype), basis), grid)


def assemble_mixtures(mixtures: Tensor, grid: Grid) -> Tensor:
    """Each sample's kernel, `(B, C_out, C_in / groups, P)`, from its mixtures `(B, m, o, i)`."""
    o, i = mixtures.shape[-2:]
    positions, rows, columns = grid
    if stand_in.is_used():  # onnxruntime moves one axis at a time three to nine times as fast as all at once
        if columns > 1:
            mixtures = mixtures.reshape(-1, positions * rows, columns, o, i).transpose(2, 3)
        flat = mixtures.reshape(-1, positions, rows * o * columns * i).transpose(1, 2)
        return flat.reshape(-1, rows * o, columns * i, positions)
    kernel = mixtures.view(-1, positions, rows, columns, o, i).permute(0, 2, 4, 3, 5, 1)
    return kernel.reshape(mixtures.shape[0], rows * o, columns * i, positions)


def forward(x: Tensor, weights: Tensor, basis: Tensor, geometry: Geometry) -> Tensor:
    kernels = assemble(weights, basis, geometry.grid)
    # From the input's channels, not the grid's: cells may span positions.
    kernels = kernels.view(*kernels.shape[:2], x.shape[1] // geometry.groups, *geometry.kernel_size)
    return per_sample(x, kernels, geometry)


def per_sample(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Convolve each sample of `x` `(B, C_in, *space)` with its kernel `(B, C_out, C_in / groups, *kernel_size)`."""
    stride, padding, dilation, groups = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    batch, channels = x.shape[:2]
    convolve = CONVOLUTIONS[x.dim() - 2]
    if batch == 0:  # a result of the right shape, with gradients of zero
        return convolve(x, kernels.sum(0), None, stride, padding, dilation, groups)
    wide = x.reshape(1, batch * channels, *x.shape[2:])
    out = convolve(wide, kernels.flatten(0, 1), None, stride, padding, dilation, batch * groups)
    return in_layout_of(x, out.view(batch, kernels.shape[1], *out.shape[2:]))
