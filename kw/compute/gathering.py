"""One sum for the gradients of cells that many layers share.

Each layer has a gradient for every cell of its warehouse. Autograd would make each of them a new tensor of the
warehouse's size, and then add it to the sum. With many cells that takes longer than the rest of a training step.

So layers read the cells through an identity, an autograd node with a buffer. The implementations that make kernels
again in the backward pass add their gradients to the buffer and return None. Autograd runs the node's backward after
those of all layers, and it returns the buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kw.compute.tracing import is_recorded, is_transformed

# The number of the running backward pass, and a call when it ends. Both are private; torch's DDP and FSDP
# use them too. Without them autograd adds up the gradients, which is slower.
try:
    _pass: Callable[[], int] = torch._C._current_graph_task_id  # -1 outside of a backward pass
    _at_end: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
    AVAILABLE = True
except AttributeError:
    AVAILABLE = False

Sums = dict[int, Tensor]  # by backward pass: passes may be nested (checkpointing), or end before they reach the node


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
        """`grad` is the gradient that autograd added up, from layers of other implementations."""
        total: Tensor | None = ctx.sums.pop(_pass(), None)
        if total is None:
            return grad
        return (total if grad is None else total.add_(grad)).to(ctx.dtype)


class Gatherer:
    """The autograd node of one warehouse's cells, for all layers and steps while the cells stay the same tensor. Copies
    and saved files start without it."""

    cells: Tensor | None
    identity: Tensor

    def __init__(self) -> None:
        self.forget()

    def __call__(self, cells: Tensor) -> Tensor:
        """The cells `(n, o, i)`, or in eager training an identity of them."""
        # torch.jit traces no tensor from outside of the model that requires a gradient.
        elsewhere = torch.compiler.is_compiling() or is_recorded(cells.shape) or is_transformed()
        eager = type(cells) is nn.Parameter and not elsewhere
        if not (AVAILABLE and eager and cells.requires_grad and torch.is_grad_enabled()):
            return cells
        if not self._is_of(cells):
            self.cells, self.identity = cells, _Gather.apply(cells)  # type: ignore[no-untyped-call]
        _forget_failed(self.identity)
        return self.identity

    def _is_of(self, cells: Tensor) -> bool:
        """Whether the node is of these cells, neither moved nor converted to another dtype."""
        ours = self.identity
        return self.cells is cells and (ours.data_ptr(), ours.dtype, ours.shape) == (
            cells.data_ptr(),
            cells.dtype,
            cells.shape,
        )

    def forget(self) -> None:
        self.cells = None
        self.identity = torch.empty(0)

    def __reduce__(self) -> tuple[type[Gatherer], tuple[()]]:
        return Gatherer, ()


def sum_of(cells: Tensor) -> Tensor | None:
    """In a backward pass, the sum to add gradients of `cells` to, zeros at first. None if `cells` is not an identity
    that a `Gatherer` made."""
    sums: Sums | None = getattr(cells.grad_fn, "sums", None)
    if sums is None:
        return None
    now = _pass()
    if now not in sums:
        # Of float32 at least: half precision would lose what many layers add.
        sums[now] = torch.zeros_like(cells, dtype=torch.promote_types(cells.dtype, torch.float32))
        # A pass that does not need gradients of the cells never reaches the node.
        _at_end(partial(_forget, sums, now))
    return sums[now]


def in_backward() -> bool:
    """Whether this thread is in a backward pass, as where activation checkpointing repeats a forward pass. Always False
    without torch's private calls."""
    return AVAILABLE and _pass() != -1


def _forget_failed(identity: Tensor) -> None:
    """Drop the sums of backward passes that raised an error, such as out of memory. Within a backward pass nothing is
    dropped: checkpointing runs forward passes there."""
    if _pass() == -1:
        identity.grad_fn.sums.clear()  # type: ignore[union-attr]


def _forget(sums: Sums, number: int) -> None:
    sums.pop(number, None)
