"""One sum for the gradients of cells that many layers draw from.

Each layer has a gradient for every cell of its warehouse. Left to autograd, each would be a tensor of the warehouse's
size, made anew and then added to the sum: where the cells are many, that takes longer than all else in a training step.
So layers draw from `gathered(cells)`, a stand-in with the same numbers. The implementations that make kernels again in
the backward pass add their gradients to the stand-in's sum, and give autograd none; autograd waits until all layers are
done, and then takes the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Which pass of the autograd engine this thread is in, and calls when a pass ends: torch's own data-parallel wrappers
# use both, but they are private. Without them autograd adds up the gradients.
try:
    _pass: Callable[[], int] = torch._C._current_graph_task_id  # -1 outside of a backward pass
    _at_end: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
    AVAILABLE = True
except AttributeError:
    AVAILABLE = False

Sums = dict[int, Tensor]  # by pass of autograd, as passes may be nested (checkpointing) or end before they come here


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(cells: Tensor) -> Tensor:
        return cells.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.dtype = Sums(), output.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        """`grad` is what came from layers that are computed in other ways, if any were."""
        total: Tensor | None = ctx.sums.pop(_pass(), None)
        if total is None:
            return grad
        return (total if grad is None else total.add_(grad)).to(ctx.dtype)


def gathered(cells: Tensor) -> Tensor:
    """A stand-in for a warehouse's cells, to draw from as often as they are the same tensor."""
    stand_in: Tensor = _Gather.apply(cells)  # type: ignore[no-untyped-call]
    return stand_in


def sum_of(cells: Tensor) -> Tensor | None:
    """Within a backward pass, where `cells` is a stand-in: the sum to add to, zeros at first. Else None."""
    sums: Sums | None = getattr(cells.grad_fn, "sums", None)
    if sums is None:
        return None
    now = _pass()
    if now not in sums:
        # Of float32 at least: half precision would lose what many layers add.
        sums[now] = torch.zeros_like(cells, dtype=torch.promote_types(cells.dtype, torch.float32))
        # A pass that does not ask for gradients of the cells never comes to _Gather.
        _at_end(partial(_forget, sums, now))
    return sums[now]


def forget_failed(stand_in: Tensor) -> None:
    """In a forward pass, drop what backward passes that ended in an error have left, as for want of memory. Within a
    backward pass, where checkpointing has forward ones, nothing is dropped."""
    if _pass() == -1:
        stand_in.grad_fn.sums.clear()  # type: ignore[union-attr]


def _forget(sums: Sums, of: int) -> None:
    sums.pop(of, None)


def in_backward() -> bool:
    """Whether this thread is within a backward pass, as where activation checkpointing repeats a forward pass."""
    return AVAILABLE and _pass() != -1
