"""The ways that rebuild their kernels in the backward pass, as an operator of torch.

As an operator, torch.compile takes them as they are, in place of unrolling their loops over blocks and samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kw.ways import rebuild
from kw.ways.convolve import Convolve
from kw.ways.multiply import Multiply
from kw.ways.task import Task

WAYS: dict[str, type[rebuild.Applied]] = {"convolve": Convolve, "multiply": Multiply}


def rebuilding(way: str, x: Tensor, alpha: Tensor, cells: Tensor, task: Task) -> Tensor:
    """Compute a layer the given way. Only what came in is kept for the backward pass."""
    out: Tensor = _forward(
        x, alpha, cells, way, task.grid, task.kernel_size, task.stride, task.padding, task.dilation, task.groups
    )
    return out


@torch.library.custom_op("kw::rebuilding", mutates_args=())
def _forward(
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    way: str,
    grid: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    task = _task(grid, kernel_size, stride, padding, dilation, groups)
    return rebuild.forward(x, alpha, cells, task, WAYS[way])


@torch.library.custom_op("kw::rebuilding_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    needed: Sequence[bool],
    way: str,
    grid: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    task = _task(grid, kernel_size, stride, padding, dilation, groups)
    grads = rebuild.backward(grad, x, alpha, cells, task, tuple(needed), WAYS[way])  # type: ignore[arg-type]
    return tuple(  # type: ignore[return-value]
        like.new_empty(0) if grad is None else grad for grad, like in zip(grads, (x, alpha, cells), strict=True)
    )


def _task(grid: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Task:
    return Task(tuple(grid), *map(tuple, (kernel_size, stride, padding, dilation)), groups)  # type: ignore[arg-type, call-arg]


@_forward.register_fake
def _(x: Tensor, alpha: Tensor, cells: Tensor, way: str, *task: Any) -> Tensor:
    return _task(*task).empty_out(x, cells)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, alpha: Tensor, cells: Tensor, needed: Sequence[bool], way: str, *task: Any
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(like) if need else like.new_empty(0)
        for like, need in zip((x, alpha, cells), needed, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, alpha, cells, *ctx.how = inputs
    ctx.save_for_backward(x, alpha, cells)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    grads = _backward(grad, *ctx.saved_tensors, needed, *ctx.how)
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * len(ctx.how))


_forward.register_autograd(_gradients, setup_context=_setup)
