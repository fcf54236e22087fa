"""Way "multiply": a block of kernels at a time, multiplied with runs of the input (strips.py) where they lie.

A block is some rows of every cell, for all samples or, where that is too much, for some. One matrix product makes its
mixtures: attentions `(mixtures, n)` with cells `(n, r * i)`. They come in the order (tap, input group, sample, output
group), that is as a matrix for each sample at each tap and input group: nothing is moved before it is applied. A block
stays in a processor's cache, and the batch's kernels never exist at once: the backward pass makes them again.

Shapes: `B` batch, `b` samples of a block; `P` taps, `R = C_out / o` and `C = C_in / i` cells across, `m = P * R * C`
mixtures; `n` cells of `o` by `i`, `r` rows of each in a block; `L` length of a run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kw.ways.product import product
from kw.ways.strips import Strips, empty
from kw.ways.task import Task

# Entries of mixtures in a block. On a CPU, where rows are cut, 16 MB, which stay in the cache; where samples are, 28
# MB, so that cells are read less often: above 32 MiB the usual allocator takes memory from the system each time anew,
# at the price of a page fault every 4 KiB. A GPU wants larger products.
ENTRIES = 4 << 20
ENTRIES_OF_SAMPLES = 7 << 20
ENTRIES_ON_GPU = 1 << 26
ROWS = 48  # that a block's kernels should have at least: products of fewer rows are slow
PIECE = 1 << 20  # entries of the cells' gradient at a time


def forward(x: Tensor, alpha: Tensor, cells: Tensor, task: Task) -> Tensor:
    """The output `(B, C_out, *out)`, computed in the precision of `x`."""
    alpha, cells = alpha.to(x.dtype), cells.to(x.dtype)
    out = task.empty_out(x, cells)
    by_cell = torch.unflatten(out, 1, (task.grid[1], -1))  # (B, R, o, *out)
    strips = Strips(tuple(x.shape[2:]), task)
    samples, blocks = _kernel_blocks(x, cells, task)
    for part in samples:
        inputs, weights = strips.lay(x[part]), _by_tap(alpha[part], task.grid)
        for rows in blocks:
            kernels = _mix(weights, cells[:, rows], task.grid)
            sums = _sums(x.dtype, of=kernels.shape[0] * kernels.shape[1])
            in_place = strips.tight and rows == slice(0, cells.shape[1]) and sums == x.dtype
            run = out[part].flatten(2) if in_place else empty(x[part], kernels.shape[3], strips.run, sums)
            for p, tap in enumerate(strips.taps):
                for c, read in enumerate(torch.split(strips.reads(inputs, tap), cells.shape[2], dim=1)):
                    _add_product(run, kernels[p, c], read, first=p == c == 0)
            if not in_place:
                by_cell[part, :, rows] = torch.unflatten(strips.outputs(run), 1, (task.grid[1], -1))
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    task: Task,
    needed: tuple[bool, bool, bool],
    total: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `x`, `alpha` and `cells`, where needed; that of `cells` is added to `total` if there is one."""
    low_alpha, low_cells = alpha.to(x.dtype), cells.to(x.dtype)
    grad_x = _grad_input(grad, x, low_alpha, low_cells, task) if needed[0] else None
    grad_alpha = alpha.new_zeros(alpha.shape, dtype=_sums(alpha.dtype)) if needed[1] else None
    grad_cells = total
    if needed[2] and total is None:
        grad_cells = cells.new_zeros(cells.shape, dtype=_sums(cells.dtype))
    if any(needed[1:]):
        _add_grad_mixed(grad, x, low_alpha, low_cells, task, grad_alpha, grad_cells)
    return (
        grad_x,
        None if grad_alpha is None else grad_alpha.to(alpha.dtype),
        None if grad_cells is None else grad_cells.to(cells.dtype),
    )


def _grad_input(grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, task: Task) -> Tensor:
    grad_x = torch.zeros_like(x)
    strips = Strips(tuple(x.shape[2:]), task)
    samples, blocks = _kernel_blocks(x, cells, task)
    for part in samples:
        strip, weights = strips.lay_out(grad[part]), _by_tap(alpha[part], task.grid)
        grads = strips.empty_grads(x[part], _sums(x.dtype))
        for rows in blocks:
            kernels = _mix(weights, cells[:, rows], task.grid)
            of_rows = _rows(strip, rows, cells.shape[1], task.grid[1])
            _add_grad_inputs(grads, of_rows, kernels, strips, first=rows is blocks[0])
        strips.put(grad_x[part], grads)
    return grad_x


def _add_grad_mixed(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    task: Task,
    grad_alpha: Tensor | None,
    grad_cells: Tensor | None,
) -> None:
    """Add the gradients of the attentions and of the cells to what is there."""
    strips = Strips(tuple(x.shape[2:]), task)
    samples, blocks = _mixture_blocks(x, cells, task)
    P, R, C = task.grid
    for part in samples:
        inputs, strip = strips.lay(x[part]), strips.lay_out(grad[part])
        weights = _by_tap(alpha[part], task.grid)
        for rows in blocks:
            piece = cells[:, rows]
            mixtures = _grad_mixtures(_rows(strip, rows, cells.shape[1], R), inputs, strips, task.grid, piece)
            if grad_alpha is not None:
                of_alpha = product(mixtures, piece.flatten(1).t()).view(P, C, -1, R, len(cells))
                torch.unflatten(grad_alpha[part], 1, task.grid).permute(1, 3, 0, 2, 4).add_(of_alpha)
            if grad_cells is not None:
                _add_in_pieces(grad_cells[:, rows], weights, mixtures)


def _kernel_blocks(x: Tensor, cells: Tensor, task: Task) -> tuple[list[slice], list[slice]]:
    """Cuts for kernels: samples, and rows of each cell. Some rows of all cells have to be copied together first; so
    rows are cut where the mixtures outnumber the cells, samples where they do not."""
    n, o, i = cells.shape
    if len(x) * task.mixtures > n:
        return _mixture_blocks(x, cells, task)
    some = max(1, _entries(x, ENTRIES_OF_SAMPLES) // (task.mixtures * o * i))
    return _slices(len(x), some), [slice(0, o)]


def _mixture_blocks(x: Tensor, cells: Tensor, task: Task) -> tuple[list[slice], list[slice]]:
    """Cuts for gradients: many samples rather than many rows, for a cell and its gradient are read for all at once."""
    _, o, i = cells.shape
    entries = _entries(x, ENTRIES)
    some, least = len(x), min(o, math.ceil(ROWS / task.grid[1]))
    while some > 1 and some * task.mixtures * least * i > entries:
        some = math.ceil(some / 2)
    return _slices(len(x), some), _slices(o, max(least, entries // (some * task.mixtures * i)))


def _slices(size: int, most: int) -> list[slice]:
    """`size` in pieces of about equal length."""
    each = math.ceil(size / math.ceil(size / most))
    return [slice(at, min(at + each, size)) for at in range(0, size, each)]


def _entries(x: Tensor, on_cpu: int) -> int:
    return on_cpu if x.device.type == "cpu" else ENTRIES_ON_GPU


def _add_grad_inputs(
    grads: dict[tuple[int, ...], Tensor], of_rows: Tensor, kernels: Tensor, strips: Strips, first: bool
) -> None:
    """Add what a block's outputs `(b, R * r, length)` give to the gradients of the input's phases."""
    seen = set() if first else set(grads)
    for p, tap in enumerate(strips.taps):
        read_by = strips.grad_reads(of_rows, tap)
        for c, group in enumerate(torch.split(grads[tap.phase], kernels.shape[4], dim=1)):
            _add_product(group, kernels[p, c].transpose(1, 2), read_by, first=tap.phase not in seen)
        seen.add(tap.phase)


def _grad_mixtures(
    of_rows: Tensor, inputs: dict[tuple[int, ...], Tensor], strips: Strips, grid: tuple[int, int, int], piece: Tensor
) -> Tensor:
    """The gradients of a block's mixtures, `(P * C * b * R, r * i)`, from those of its outputs."""
    P, R, C = grid
    _, r, i = piece.shape
    mixtures = of_rows.new_empty(P, C, len(of_rows), R * r, i)
    run = of_rows[:, :, strips.before : strips.before + strips.run]
    for p, tap in enumerate(strips.taps):
        for c, read in enumerate(torch.split(strips.reads(inputs, tap), i, dim=1)):
            torch.bmm(run, read.transpose(1, 2), out=mixtures[p, c])
    return mixtures.view(-1, r * i)


def _add_in_pieces(total: Tensor, weights: Tensor, mixtures: Tensor) -> None:
    """`total += weights.T @ mixtures`: `(n, r, i)`, `(m, n)`, `(m, r * i)`; in pieces that stay in the cache."""
    n, _, i = total.shape
    few = max(1, PIECE // (n * i))
    for rows, some in zip(torch.split(total, few, dim=1), torch.split(mixtures, few * i, dim=1), strict=True):
        rows.add_(product(weights.t(), some.contiguous()).view(rows.shape))


def _mix(weights: Tensor, cells: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Mixtures of some rows of cells `(n, r, i)`, as matrices `(P, C, b, R * r, i)`."""
    P, R, C = grid
    _, r, i = cells.shape
    return product(weights, cells.flatten(1)).view(P, C, -1, R * r, i)


def _by_tap(alpha: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Attentions `(b, m, n)` as `(P * C * b * R, n)`."""
    return torch.unflatten(alpha, 1, grid).permute(1, 3, 0, 2, 4).reshape(-1, alpha.shape[2])


def _rows(strip: Tensor, rows: slice, o: int, groups: int) -> Tensor:
    """Some rows of every output group, `(b, R * o, length)` to `(b, R * r, length)`."""
    if rows == slice(0, o):
        return strip
    return torch.unflatten(strip, 1, (groups, o))[:, :, rows].flatten(1, 2)


def _add_product(total: Tensor, kernels: Tensor, read: Tensor, first: bool) -> None:
    """`total += kernels @ read`, without the old total at first: `(b, M, L)`, `(b, M, K)`, `(b, K, L)`."""
    if total.dtype != read.dtype:
        product_of = torch.bmm(kernels, read)
        _ = total.copy_(product_of) if first else total.add_(product_of)
        return
    if total.stride(2) != 1:  # channels last
        total, kernels, read = total.transpose(1, 2), read.transpose(1, 2), kernels.transpose(1, 2)
    total.baddbmm_(kernels, read, beta=0 if first else 1)


def _sums(dtype: torch.dtype, of: int = 2) -> torch.dtype:
    """The type in which so many summands are added up: half precision would lose them."""
    return torch.promote_types(dtype, torch.float32) if of > 1 else dtype
