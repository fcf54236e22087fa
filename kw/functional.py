"""Computing one KernelWarehouse layer from its input, its attentions and its warehouse's cells.

There are several exact ways (`kw/ways/`, one a file), which differ in time and memory. "auto", the default, takes the
one that the cost model (`kw/ways/cost.py`) expects to be fastest; `use` forces another.

Shapes: `B` batch, `m` mixtures, `n` cells, `o` by `i` channels of a cell.
"""

from __future__ import annotations

from functools import lru_cache
from types import TracebackType

import torch
from torch import Tensor
from torch.nn import functional as F

from kw.ways import WAYS as FUNCTIONS
from kw.ways import Task, assemble
from kw.ways.cost import applies, cheapest, costs

__all__ = ["WAYS", "assemble", "compute", "convolution", "linear", "prepare", "use", "way_of"]

WAYS = ("auto", *FUNCTIONS)
_way = "auto"


class use:
    """Force a way of computing, for good (`use("grouped")`) or within a block (`with use("grouped"): ...`).

    A layer that the way does not apply to is computed by "grouped".

    Raises:
        ValueError: there is no such way.
    """

    def __init__(self, way: str):
        global _way
        if way not in WAYS:
            raise ValueError(f"There is no way {way!r} to compute a layer; there are {', '.join(WAYS)}.")
        self._previous, _way = _way, way

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _way
        _way = self._previous


def linear(x: Tensor, alpha: Tensor, cells: Tensor, grid: tuple[int, int, int], bias: Tensor | None = None) -> Tensor:
    """`(B, *, C_in)` with one kernel per sample and a static bias `(C_out,)` to `(B, *, C_out)`."""
    tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)  # (B, S, C_in)
    out = compute(tokens.transpose(1, 2), alpha, cells, Task(grid, (1,), (1,), (0,), (1,)), bias)
    return out.transpose(1, 2).reshape(*x.shape[:-1], out.shape[1])


def convolution(
    x: Tensor,
    alpha: Tensor,
    cells: Tensor,
    grid: tuple[int, int, int],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Convolve `(B, C_in, *space)` with one kernel per sample: attentions `(B, m, n)` over cells `(n, o, i)`.

    Mixture `(p, a, b)` of `grid = (P, C_out / o, C_in / groups / i)` is the kernel's cell at position p, rows `a * o`,
    columns `b * i`. `padding` is a number a side for each dimension, "same" or "valid".
    """
    x, task = prepare(x, grid, kernel_size, stride, padding, dilation, groups)
    return compute(x, alpha, cells, task, bias)


def prepare(
    x: Tensor,
    grid: tuple[int, int, int],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, Task]:
    """The input of `convolution` with its task, which knows only padding that is the same on both sides of a dimension:
    where "same" asks for one position more behind, `x` comes back with it."""
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel_size, strict=True)]
        if any(total % 2 for total in totals):  # one more behind than in front
            x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
        padding = tuple(total // 2 for total in totals)
    return x, Task(grid, kernel_size, stride, padding, dilation, groups)


def way_of(x: Tensor, cells: Tensor, task: Task, needs_grad: bool) -> str:
    """The way that a layer is computed by: the forced one, if it applies, or that expected to be fastest.

    Args:
        x, cells, task: as for `compute`.
        needs_grad: whether the attentions need one.
    """
    if _way != "auto":
        return _way if applies(_way, x.shape, task) else "grouped"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "grouped"  # a trace takes no operators of our own, and would keep the loops of one batch's sizes
    step = torch.is_grad_enabled() and (needs_grad or x.requires_grad or cells.requires_grad)
    choose = _choose if torch.compiler.is_compiling() else _remembered  # torch.compile cannot look into caches
    return choose(tuple(x.shape), tuple(cells.shape), task, step, x.device.type)


def _choose(x_shape: tuple[int, ...], cells_shape: tuple[int, ...], task: Task, step: bool, device: str) -> str:
    return cheapest(costs(x_shape, cells_shape, task, step, device))


_remembered = lru_cache(maxsize=4096)(_choose)  # to weigh the ways of a small layer takes as long as to compute it


def compute(
    x: Tensor, alpha: Tensor, cells: Tensor, task: Task, bias: Tensor | None = None, way: str | None = None
) -> Tensor:
    """`convolution` of what `prepare` gives, to `(B, C_out, *out)`; the `way` is that of `way_of` if left out."""
    kind = x.device.type
    way = way_of(x, cells, task, alpha.requires_grad) if way is None else way
    if kind != "meta" and torch.is_autocast_enabled(kind) and cells.dtype == torch.float32:
        # Autocast does not look into functions that have a backward pass of their own.
        x = x.to(torch.get_autocast_dtype(kind))
    if way != "multiply":  # which computes as its input is, and adds up gradients as the cells are
        alpha, cells = alpha.to(x.dtype), cells.to(x.dtype)
    out = FUNCTIONS[way](x, alpha, cells, task)
    if bias is None:
        return out
    bias = bias.to(out.dtype).view(-1, *(1,) * (out.dim() - 2))
    # New memory for a large output costs more than the sum. But in place in a view, autograd copies its gradient.
    return out.add_(bias) if way == "multiply" or not out.requires_grad else out + bias
