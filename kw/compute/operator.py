"""The implementations that make kernels again in the backward pass ("blocks", "triton"), as one custom operator.

torch.compile does not trace into an operator, and so does not unroll their loops. Their gradients are written by hand,
and keep only the input, the weights and the basis (mixing.py) for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kw.compute import blocks, samples
from kw.compute.gathering import sum_of
from kw.compute.geometry import Geometry, empty_like
from kw.compute.mixing import is_shared
from kw.compute.tracing import is_observed, is_recorded

REMADE: dict[str, ModuleType] = {"blocks": blocks, "triton": samples}


def remade(name: str) -> Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]:
    """The implementation of this name, with gradients."""

    def compute(x: Tensor, weights: Tensor, basis: Tensor, geometry: Geometry) -> Tensor:
        eager = (
            not torch.compiler.is_compiling()
            and not is_recorded(x.shape)
            and not is_observed()
            and type(x) in (Tensor, torch.nn.Parameter)
        )
        if eager:  # the operator's overhead is as much as a small layer
            out: Tensor = _Eager.apply(x, weights, basis, name, geometry)  # type: ignore[no-untyped-call]
            return out
        return _forward(  # type: ignore[no-any-return]
            x, weights, basis, name, geometry.grid, geometry.kernel_size, geometry.stride, geometry.padding,
            geometry.dilation, geometry.groups,
        )  # fmt: skip

    return compute


class _Eager(torch.autograd.Function):
    """The same without the operator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, basis: Tensor, name: str, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weights, basis)
        ctx.name, ctx.geometry = name, geometry
        out: Tensor = REMADE[name].forward(x, weights, basis, geometry)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second(ctx.name)
        needed = ctx.needs_input_grad[:3]
        x, weights, basis = ctx.saved_tensors
        total = sum_of(basis) if needed[2] and is_shared(basis) else None
        grads = REMADE[ctx.name].backward(grad, x, weights, basis, ctx.geometry, needed, total)
        return grads[0], grads[1], None if total is not None else grads[2], None, None


def _refuse_second(name: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"Implementation {name!r} has no gradient of its gradient (create_graph=True): "
            f'run the forward pass within kw.functional.use("grouped").'
        )


@torch.library.custom_op("kw::convolve", mutates_args=())
def _forward(
    x: Tensor,
    weights: Tensor,
    basis: Tensor,
    name: str,
    grid: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = _geometry(grid, kernel_size, stride, padding, dilation, groups)
    out: Tensor = REMADE[name].forward(x, weights, basis, geometry)
    return out


@torch.library.custom_op("kw::convolve_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    basis: Tensor,
    needed: Sequence[bool],
    name: str,
    grid: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = _geometry(grid, kernel_size, stride, padding, dilation, groups)
    grads = REMADE[name].backward(grad, x, weights, basis, geometry, tuple(needed))
    return tuple(  # type: ignore[return-value]
        like.new_empty(0) if grad is None else grad for grad, like in zip(grads, (x, weights, basis), strict=True)
    )


def _geometry(grid: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry:
    return Geometry(tuple(grid), *map(tuple, (kernel_size, stride, padding, dilation)), groups)  # type: ignore[arg-type, call-arg]


@_forward.register_fake
def _(x: Tensor, weights: Tensor, basis: Tensor, name: str, *geometry: Any) -> Tensor:
    return _geometry(*geometry).empty_out(x, basis.shape[-2])


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weights: Tensor, basis: Tensor, needed: Sequence[bool], name: str, *geometry: Any
) -> tuple[Tensor, ...]:
    shapes = (empty_like(x), weights.new_empty(weights.shape), basis.new_empty(basis.shape))
    return tuple(like if need else like.new_empty(0) for like, need in zip(shapes, needed, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, basis, *ctx.how = inputs
    ctx.save_for_backward(x, weights, basis)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_second(ctx.how[0])
    needed = ctx.needs_input_grad[:3]
    x, weights, basis = ctx.saved_tensors
    total = sum_of(basis) if needed[2] and is_shared(basis) and not is_observed() else None
    if total is None:
        grads = _backward(grad, x, weights, basis, needed, *ctx.how)
    else:
        name, *geometry = ctx.how
        grads = (*REMADE[name].backward(grad, x, weights, basis, _geometry(*geometry), needed, total)[:2], None)
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * len(ctx.how))


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.kw.convolve)
def _flops(
    x_shape: Sequence[int], weights_shape: Sequence[int], basis_shape: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """What torch's FlopCounterMode counts for the operator: two for each multiply-add of the products in "grouped"."""
    make, apply = _multiply_adds(x_shape, weights_shape, basis_shape, *args[1:7])
    return 2 * (make + apply)


@register_flop_formula(torch.ops.kw.convolve_backward)
def _flops_backward(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    weights_shape: Sequence[int],
    basis_shape: Sequence[int],
    needed: Sequence[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    """One product each for the gradients of input, kernels, weights and basis. Making the kernels again is not counted,
    so that all implementations have one count."""
    make, apply = _multiply_adds(x_shape, weights_shape, basis_shape, *args[1:7])
    of_x, of_weights, of_basis = needed
    return 2 * (apply * (of_x + (of_weights or of_basis)) + make * (of_weights + of_basis))


def _multiply_adds(
    x_shape: Sequence[int], weights_shape: Sequence[int], basis_shape: Sequence[int], *geometry: Any
) -> tuple[int, int]:
    """Multiply-adds that make a batch's kernels from the weights and the basis, and that apply them."""
    batch, mixtures, terms = weights_shape
    entries = batch * mixtures * basis_shape[-2] * basis_shape[-1]
    return entries * terms, entries * math.prod(_geometry(*geometry).out_size(tuple(x_shape[2:])))
