"""Implementation "blocks": make a block of kernels at a time, and multiply it with runs of the input (strips.py).

A block is some rows of every cell, for all samples or, if that is too much, for some. One matrix product makes its
mixtures (mixing.py) in the order (tap, input cell, sample, output cell), which is a matrix for each sample at each tap
and input cell, ready to be applied without a copy. A block stays in a CPU's cache. The batch's kernels never exist all
at once; the backward pass makes them again.

Shapes: `B` batch, `b` samples of a block; `P` taps, `R = C_out / o` and `C = C_in / i` cells across, `m = P * R * C`
mixtures of `J` terms; cells of `o` by `i`, `r` rows of each in a block; `L` length of a run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kw.compute.geometry import Geometry, Grid, empty_like
from kw.compute.mixing import Block, is_shared
from kw.compute.narrow import NARROW
from kw.compute.strips import Strips, empty

# Entries of mixtures in a block. On a CPU, 16 MB (fits the cache) if rows of cells are cut, and 28 MB if the batch is
# cut, to read cells less often. Above 32 MiB the usual allocator requests memory from the system for every tensor, with
# a page fault every 4 KiB. A GPU needs larger products.
ENTRIES = 4 << 20
ENTRIES_OF_SAMPLES = 7 << 20
ENTRIES_ON_GPU = 1 << 26
ROWS = 48  # least rows of a block's kernels: products of fewer rows are slow


def forward(x: Tensor, weights: Tensor, basis: Tensor, geometry: Geometry) -> Tensor:
    """The output `(B, C_out, *out)`, computed in the precision of `x`. The basis may be narrow (narrow.py)."""
    weights = weights.to(x.dtype)
    if basis.dtype not in NARROW:
        basis = basis.to(x.dtype)
    rows_of_cell = basis.shape[-2]
    out = geometry.empty_out(x, rows_of_cell)
    by_cell = torch.unflatten(out, 1, (geometry.grid[1], -1))  # (B, R, o, *out)
    strips = Strips(tuple(x.shape[2:]), geometry)
    samples, blocks = _kernel_blocks(x, basis, geometry)
    for part in samples:
        inputs, block = strips.lay(x[part]), Block(weights[part], basis, geometry.grid)
        for rows in blocks:
            kernels = block.mix(rows)
            sums = _sums(x.dtype, of=kernels.shape[0] * kernels.shape[1])
            in_place = strips.tight and rows == slice(0, rows_of_cell) and sums == x.dtype
            run = out[part].flatten(2) if in_place else empty(x[part], kernels.shape[3], strips.run, sums)
            for p, tap in enumerate(strips.taps):
                for c, read in enumerate(torch.split(strips.reads(inputs, tap), kernels.shape[4], dim=1)):
                    _add_product(run, kernels[p, c], read, first=p == c == 0)
            if not in_place:
                by_cell[part, :, rows] = torch.unflatten(strips.outputs(run), 1, (geometry.grid[1], -1))
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    basis: Tensor,
    geometry: Geometry,
    needed: tuple[bool, bool, bool],
    total: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `x`, `weights` and `basis`, where needed; that of `basis` is added to a `total`."""
    low_weights, low_basis = weights.to(x.dtype), basis.to(x.dtype)
    grad_x = _grad_input(grad, x, low_weights, low_basis, geometry) if needed[0] else None
    grad_weights = weights.new_zeros(weights.shape, dtype=_sums(weights.dtype)) if needed[1] else None
    grad_basis = total
    if needed[2] and total is None:
        grad_basis = basis.new_zeros(basis.shape, dtype=_sums(basis.dtype))
    if any(needed[1:]):
        _add_grads_of_kernels(grad, x, low_weights, low_basis, geometry, grad_weights, grad_basis)
    return (
        grad_x,
        None if grad_weights is None else grad_weights.to(weights.dtype),
        None if grad_basis is None else grad_basis.to(basis.dtype),
    )


def _grad_input(grad: Tensor, x: Tensor, weights: Tensor, basis: Tensor, geometry: Geometry) -> Tensor:
    grad_x = empty_like(x).zero_()
    strips = Strips(tuple(x.shape[2:]), geometry)
    samples, blocks = _kernel_blocks(x, basis, geometry)
    for part in samples:
        strip, block = strips.lay_out(grad[part]), Block(weights[part], basis, geometry.grid)
        grads = strips.empty_grads(x[part], _sums(x.dtype))
        for rows in blocks:
            of_rows = _rows(strip, rows, basis.shape[-2], geometry.grid[1])
            _add_grad_inputs(grads, of_rows, block.mix(rows), strips, first=rows is blocks[0])
        strips.put(grad_x[part], grads)
    return grad_x


def _add_grads_of_kernels(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    basis: Tensor,
    geometry: Geometry,
    grad_weights: Tensor | None,
    grad_basis: Tensor | None,
) -> None:
    """Add to the gradients of the weights and of the basis, in place."""
    strips = Strips(tuple(x.shape[2:]), geometry)
    samples, blocks = _mixture_blocks(x, basis, geometry)
    o, i = basis.shape[-2:]
    for part in samples:
        inputs, strip = strips.lay(x[part]), strips.lay_out(grad[part])
        block = Block(weights[part], basis, geometry.grid)
        for rows in blocks:
            mixtures = _grad_mixtures(_rows(strip, rows, o, geometry.grid[1]), inputs, strips, geometry.grid, i)
            block.add_grads(mixtures, rows, None if grad_weights is None else grad_weights[part], grad_basis)


def _kernel_blocks(x: Tensor, basis: Tensor, geometry: Geometry) -> tuple[list[slice], list[slice]]:
    """How to cut the forward pass: slices of the batch, and of each cell's rows. Some rows of all cells must first be
    copied together, so rows are cut only where there are more mixtures than cells, and else the batch is."""
    o, i = basis.shape[-2:]
    if not is_shared(basis) or len(x) * geometry.mixtures > len(basis):
        return _mixture_blocks(x, basis, geometry)
    some = max(1, _entries(x, ENTRIES_OF_SAMPLES) // (geometry.mixtures * o * i))
    return _slices(len(x), some), [slice(0, o)]


def _mixture_blocks(x: Tensor, basis: Tensor, geometry: Geometry) -> tuple[list[slice], list[slice]]:
    """How to cut the gradients: many samples rather than many rows, to read a cell and its gradient once for all."""
    o, i = basis.shape[-2:]
    entries = _entries(x, ENTRIES)
    some, least = len(x), min(o, math.ceil(ROWS / geometry.grid[1]))
    while some > 1 and some * geometry.mixtures * least * i > entries:
        some = math.ceil(some / 2)
    return _slices(len(x), some), _slices(o, max(least, entries // (some * geometry.mixtures * i)))


def _slices(size: int, most: int) -> list[slice]:
    """Slices of about equal length, `most` at most, that cover `size`."""
    each = math.ceil(size / math.ceil(size / most))
    return [slice(at, min(at + each, size)) for at in range(0, size, each)]


def _entries(x: Tensor, on_cpu: int) -> int:
    return on_cpu if x.device.type == "cpu" else ENTRIES_ON_GPU


def _add_grad_inputs(
    grads: dict[tuple[int, ...], Tensor], of_rows: Tensor, kernels: Tensor, strips: Strips, first: bool
) -> None:
    """Add to the gradients of the input's phases what the gradients of a block's outputs `(b, R * r, length)`
    contribute."""
    seen = set() if first else set(grads)
    for p, tap in enumerate(strips.taps):
        read_by = strips.grad_reads(of_rows, tap)
        for c, group in enumerate(torch.split(grads[tap.phase], kernels.shape[4], dim=1)):
            _add_product(group, kernels[p, c].transpose(1, 2), read_by, first=tap.phase not in seen)
        seen.add(tap.phase)


def _grad_mixtures(
    of_rows: Tensor, inputs: dict[tuple[int, ...], Tensor], strips: Strips, grid: Grid, i: int
) -> Tensor:
    """The gradients of a block's mixtures, `(P, C, b, R * r, i)`, from those of its outputs."""
    P, _, C = grid
    mixtures = of_rows.new_empty(P, C, *of_rows.shape[:2], i)
    run = of_rows[:, :, strips.before : strips.before + strips.run]
    for p, tap in enumerate(strips.taps):
        for c, read in enumerate(torch.split(strips.reads(inputs, tap), i, dim=1)):
            torch.bmm(run, read.transpose(1, 2), out=mixtures[p, c])
    return mixtures


def _rows(strip: Tensor, rows: slice, o: int, groups: int) -> Tensor:
    """Some rows of every output group, `(b, R * o, length)` to `(b, R * r, length)`."""
    if rows == slice(0, o):
        return strip
    return torch.unflatten(strip, 1, (groups, o))[:, :, rows].flatten(1, 2)


def _add_product(total: Tensor, kernels: Tensor, read: Tensor, first: bool) -> None:
    """`total += kernels @ read`, or `total = ...` at first: `(b, M, L)`, `(b, M, K)`, `(b, K, L)`."""
    if total.dtype != read.dtype:
        product_of = torch.bmm(kernels, read)
        _ = total.copy_(product_of) if first else total.add_(product_of)
        return
    if total.stride(2) != 1:  # channels last
        total, kernels, read = total.transpose(1, 2), read.transpose(1, 2), kernels.transpose(1, 2)
    total.baddbmm_(kernels, read, beta=0 if first else 1)


def _sums(dtype: torch.dtype, of: int = 2) -> torch.dtype:
    """The dtype in which `of` summands are added up: half precision would lose them."""
    return torch.promote_types(dtype, torch.float32) if of > 1 else dtype
