"""Way "multiply", which makes its kernels again in the backward pass, as an operator of torch.

As an operator, torch.compile takes it as it is, in place of unrolling its loops over blocks and samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kw.ways.gathering import sum_of
from kw.ways.multiply import backward, forward
from kw.ways.task import Task


def multiply(x: Tensor, alpha: Tensor, cells: Tensor, task: Task) -> Tensor:
    """Way "multiply", with gradients. Only what came in is kept for the backward pass."""
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return forward(x, alpha, cells, task)  # the operator's own costs are as much as a small layer's
    out: Tensor = _forward(
        x, alpha, cells, task.grid, task.kernel_size, task.stride, task.padding, task.dilation, task.groups
    )
    return out


@torch.library.custom_op("kw::multiply", mutates_args=())
def _forward(
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    grid: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    task = _task(grid, kernel_size, stride, padding, dilation, groups)
    return forward(x, alpha, cells, task)


@torch.library.custom_op("kw::multiply_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    needed: Sequence[bool],
    grid: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    task = _task(grid, kernel_size, stride, padding, dilation, groups)
    grads = backward(grad, x, alpha, cells, task, tuple(needed))  # type: ignore[arg-type]
    return tuple(  # type: ignore[return-value]
        like.new_empty(0) if grad is None else grad for grad, like in zip(grads, (x, alpha, cells), strict=True)
    )


def _task(grid: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Task:
    return Task(tuple(grid), *map(tuple, (kernel_size, stride, padding, dilation)), groups)  # type: ignore[arg-type, call-arg]


@_forward.register_fake
def _(x: Tensor, alpha: Tensor, cells: Tensor, *task: Any) -> Tensor:
    return _task(*task).empty_out(x, cells)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, needed: Sequence[bool], *task: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(like) if need else like.new_empty(0)
        for like, need in zip((x, alpha, cells), needed, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, alpha, cells, *ctx.how = inputs
    ctx.save_for_backward(x, alpha, cells)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            'A gradient of a gradient (create_graph=True) cannot be taken of layers computed the way "multiply": run '
            'the forward pass within kw.functional.use("grouped").'
        )
    needed = ctx.needs_input_grad[:3]
    x, alpha, cells = ctx.saved_tensors
    total = sum_of(cells) if needed[2] else None
    if total is None:
        grads = _backward(grad, x, alpha, cells, needed, *ctx.how)
    else:
        grads = (*backward(grad, x, alpha, cells, _task(*ctx.how), needed, total)[:2], None)
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * len(ctx.how))


_forward.register_autograd(_gradients, setup_context=_setup)
