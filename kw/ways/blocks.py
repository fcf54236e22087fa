"""Way "blocks": assemble and apply a block of the batch's kernels at a time, and rebuild it in the backward pass.

A block is some rows of every cell, for all samples, or for some of them where that is too much. Its kernels are the
product of the attentions with those columns of the cells; they are applied by one matrix product per sample, to the
input's taps, and are gone before the next block. So the batch's kernels never exist at once, blocks stay in a
processor's cache, and few positions or one (linear layers) are as good as many.

Shapes: `b` samples of this block; `P` taps, `R = C_out / o` and `C = C_in / i` cells across; `n` cells of `o` by `i`,
`r` rows of each in this block; `S` output positions.
"""

from __future__ import annotations

import math
import torch
from torch import Tensor

from kw.ways.mixing import Mixer, in_type_of, zeros_for
from kw.ways.product import products
from kw.ways.task import Task

ENTRIES = {"cpu": 1 << 22}  # of assembled kernels at a time; a GPU wants larger products
ENTRIES_ELSEWHERE = 1 << 26
ROWS = 64  # that a block should have at least


def cut(batch: int, mixtures: int, o: int, i: int, limit: int) -> tuple[int, int]:
    """Samples, and rows of each cell, of a block with about `limit` entries."""
    some = batch
    while some > 1 and some * mixtures * min(o, ROWS) * i > limit:
        some = (some + 1) // 2
    rows = min(max(limit // (some * mixtures * i), ROWS), o)
    return some, math.ceil(o / math.ceil(o / rows))  # of equal height


def _plan(x: Tensor, cells: Tensor, task: Task) -> tuple[Mixer, list[slice], list[slice]]:
    """Buffers of a block's size, the cuts of the batch, and those of a cell's rows."""
    _, o, i = cells.shape
    some, rows = cut(len(x), task.mixtures, o, i, ENTRIES.get(x.device.type, ENTRIES_ELSEWHERE))
    mixer = Mixer(task.grid, some * task.mixtures * rows * i, cells)
    return mixer, [slice(b, b + some) for b in range(0, len(x), some)], [slice(r, r + rows) for r in range(0, o, rows)]


def forward(x: Tensor, alpha: Tensor, cells: Tensor, task: Task) -> Tensor:
    """For `groups == 1`."""
    out = task.empty_out(x, cells)
    last = out.stride(1) == 1
    by_cell = out.flatten(2).unflatten(1, (task.grid[1], -1))  # (B, R, o, S)
    mixer, samples, rows = _plan(x, cells, task)
    for part in samples:
        taps = task.taps(x[part])
        for some in rows:
            kernels = mixer.kernels(alpha[part], cells[:, some])
            if last:
                y = products(taps, kernels.transpose(1, 2)).transpose(1, 2)
            else:
                y = products(kernels, taps.transpose(1, 2))
            by_cell[part, :, some] = y.unflatten(1, (task.grid[1], -1))
    return out


def backward(
    grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, task: Task, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of `x`, `alpha` and `cells` that are needed."""
    need_x, need_alpha, need_cells = needed
    grad_x = torch.empty_like(x) if need_x else None
    grad_alpha = zeros_for(alpha) if need_alpha else None
    grad_cells = zeros_for(cells) if need_cells else None
    grad = grad.flatten(2).unflatten(1, (task.grid[1], -1))  # (B, R, o, S)
    mixer, samples, rows = _plan(x, cells, task)
    for part in samples:
        taps = task.taps(x[part])
        grad_taps = torch.zeros_like(taps) if need_x else None
        for some in rows:
            g = grad[part, :, some].flatten(1, 2)  # (b, R * r, S)
            if grad_taps is not None:
                grad_taps += products(g.transpose(1, 2), mixer.kernels(alpha[part], cells[:, some]))
            if need_alpha or need_cells:
                grad_kernels = products(g, taps)
                of_alpha = None if grad_alpha is None else grad_alpha[part]
                of_cells = None if grad_cells is None else grad_cells[:, some]
                mixer.add_gradients(grad_kernels, alpha[part], cells[:, some], of_alpha, of_cells)
        if grad_x is not None:
            grad_x[part] = task.untap(grad_taps, x[part])
    return grad_x, in_type_of(alpha, grad_alpha), in_type_of(cells, grad_cells)
