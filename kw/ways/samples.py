"""Way "samples": assemble the kernels of a few samples, convolve each, and go on; rebuild them in the backward pass.

The library's own convolution is best where there are many positions, and its threads share one image as well as a
batch. The batch's kernels never exist at once. Kernels are laid out channels last, `(C_out, *kernel_size, C_in)`: so
they come from the mixtures by moving runs of `i` numbers, not single ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kw.ways.grouped import CONVOLUTIONS
from kw.ways.mixing import Mixer, in_type_of, zeros_for
from kw.ways.task import Task

ENTRIES = 1 << 20  # of assembled kernels at a time


def _cut(batch: int, cells: Tensor, task: Task) -> tuple[int, list[slice]]:
    """Entries of the largest part, and the parts of the batch."""
    one = task.mixtures * cells[0].numel()
    few = min(max(ENTRIES // one, 1), batch)
    return few * one, [slice(start, start + few) for start in range(0, batch, few)]


def _as_weights(kernels: Tensor, task: Task) -> Tensor:
    """`(b, C_out, P * C_in / groups)` as convolutions want it, `(b, C_out, C_in / groups, *kernel_size)`; a view."""
    return kernels.view(*kernels.shape[:2], *task.kernel_size, -1).movedim(-1, 2)


def forward(x: Tensor, alpha: Tensor, cells: Tensor, task: Task) -> Tensor:
    out = task.empty_out(x, cells)
    convolve = CONVOLUTIONS[x.dim() - 2]
    entries, parts = _cut(len(x), cells, task)
    mixer = Mixer(task.grid, entries, cells)
    for part in parts:
        kernels = _as_weights(mixer.kernels(alpha[part], cells), task)
        for one, kernel, place in zip(x[part].split(1), kernels, out[part].split(1), strict=True):
            place.copy_(convolve(one, kernel, None, task.stride, task.padding, task.dilation, task.groups))
    return out


def backward(
    grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, task: Task, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of `x`, `alpha` and `cells` that are needed."""
    need_x, need_alpha, need_cells = needed
    need_kernels = need_alpha or need_cells
    grad_x = torch.empty_like(x) if need_x else None
    grad_alpha = zeros_for(alpha) if need_alpha else None
    grad_cells = zeros_for(cells) if need_cells else None
    entries, parts = _cut(len(x), cells, task)
    mixer = Mixer(task.grid, entries, cells)
    for part in parts:
        kernels = _as_weights(mixer.kernels(alpha[part], cells), task)
        grad_kernels = torch.empty_like(kernels) if need_kernels else None
        for b, kernel in enumerate(kernels):
            g, one = grad[part][b : b + 1], x[part][b : b + 1]
            of_x, of_kernel = _convolution_backward(g, one, kernel, task, (need_x, need_kernels))
            if grad_x is not None:
                grad_x[part][b : b + 1] = of_x
            if grad_kernels is not None:
                grad_kernels[b] = of_kernel
        if grad_kernels is not None:
            flat = grad_kernels.movedim(2, -1).flatten(2)
            of_alpha = None if grad_alpha is None else grad_alpha[part]
            mixer.add_gradients(flat, alpha[part], cells, of_alpha, grad_cells)
    return grad_x, in_type_of(alpha, grad_alpha), in_type_of(cells, grad_cells)


def _convolution_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, task: Task, need: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and the kernel; None for what is not needed."""
    zeros = [0] * (x.dim() - 2)
    grads = torch.ops.aten.convolution_backward(
        grad, x, kernel, None, task.stride, task.padding, task.dilation, False, zeros, task.groups, (*need, False)
    )
    return grads[0], grads[1]
