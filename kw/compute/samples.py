"""Implementation "triton", for GPUs: make the kernels of some samples at a time, and apply them without a copy.

One matrix product makes the kernels (mixing.py). A Triton kernel applies them, without unfolding the input
(implicit.py); kernels of pointwise and linear layers are matrices, which torch's batched products apply. The backward
pass makes the kernels again, so that a batch's kernels never exist all at once.

Shapes: `B` batch, `P` taps, `R` by `C` cells of a kernel at a tap, `o` by `i` channels of a cell, `S` positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kw.compute import implicit
from kw.compute.geometry import Geometry, empty_like
from kw.compute.mixing import grad_basis, grad_weights, mix_into

ENTRIES = 1 << 27  # kernel entries at a time: 256 MiB in half precision, enough to fill a GPU with products of any size
ALIGNMENT = 16  # bytes, of rows that matrix units read
SAMPLES = 65_535  # at a time: CUDA's limit for the second axis of a grid


def forward(x: Tensor, weights: Tensor, basis: Tensor, geometry: Geometry) -> Tensor:
    """The output `(B, C_out, *out)`, computed in the precision of `x`, with sums in float32."""
    weights, basis = _aligned(weights, basis, x.dtype)
    out = geometry.empty_out(x, basis.shape[-2])
    with _device_of(x):
        for part, kernels in _kernels(x, weights, basis, geometry):
            if _is_matrix(geometry):
                _product(_matrix(kernels), x[part].flatten(2), out[part].flatten(2))
            else:
                implicit.forward(x[part], kernels, geometry, out[part])
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
    with _device_of(x):
        return _backward(grad, x, weights, basis, geometry, needed, total)


def _backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    basis: Tensor,
    geometry: Geometry,
    needed: tuple[bool, bool, bool],
    total: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    terms = weights.shape[2]
    low_weights, low_basis = _aligned(weights, basis, x.dtype)
    grad_x = empty_like(x) if needed[0] else None
    of_weights: list[Tensor] = []
    of_basis = total
    for part, kernels in _kernels(x, low_weights, low_basis, geometry, filled=needed[0]):
        if grad_x is not None:
            _grad_input(grad[part], kernels, geometry, grad_x[part])
        if not any(needed[1:]):
            continue
        _grad_kernels(grad[part], x[part], geometry, kernels)  # overwrites the kernels
        mixtures = kernels.flatten(1, 3)  # (b, m, o, i)
        if needed[1]:
            of_weights.append(grad_weights(mixtures, low_basis)[..., :terms].to(weights.dtype))
        if needed[2]:
            of_part = grad_basis(mixtures, low_weights[part], low_basis.shape)[:terms]
            # Parts add up in float32: half precision would lose what many samples add.
            of_basis = of_part.to(_sums(basis, kernels, x)) if of_basis is None else of_basis.add_(of_part)
    joined = of_weights[0].contiguous() if len(of_weights) == 1 else torch.cat(of_weights) if of_weights else None
    return grad_x, joined, None if of_basis is None else of_basis.to(basis.dtype)


def _aligned(weights: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights and basis in this dtype, filled with terms of zeros up to a multiple of 16 bytes. Rows of other lengths
    are read number by number: on an H100 that was half of a training step's time (docs/gpu.md)."""
    missing = -weights.shape[2] % (ALIGNMENT // dtype.itemsize)
    if not missing:
        return weights.to(dtype), basis.to(dtype)
    return _filled(weights, 2, missing, dtype), _filled(basis, 0, missing, dtype)


def _filled(x: Tensor, dim: int, missing: int, dtype: torch.dtype) -> Tensor:
    shape = list(x.shape)
    shape[dim] += missing
    filled = x.new_zeros(shape, dtype=dtype)
    filled.narrow(dim, 0, x.shape[dim]).copy_(x)
    return filled


def _sums(basis: Tensor, kernels: Tensor, x: Tensor) -> torch.dtype:
    """The dtype of a sum over the parts of a batch."""
    return basis.dtype if len(kernels) == len(x) else torch.promote_types(basis.dtype, torch.float32)


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of `x` the current one, because Triton launches there, wherever the tensors are. Fake tensors of
    a GPU that does not exist do not need it."""
    return torch.cuda.device(x.device) if x.is_cuda and torch.cuda.is_available() else nullcontext()


def _kernels(
    x: Tensor, weights: Tensor, basis: Tensor, geometry: Geometry, filled: bool = True
) -> Iterator[tuple[slice, Tensor]]:
    """The kernels of some samples at a time, `(b, P, R, C, o, i)`; uninitialized unless `filled`."""
    o, i = basis.shape[-2:]
    some = min(SAMPLES, max(1, ENTRIES // (geometry.mixtures * o * i)))
    parts = -(-len(x) // some)
    each = -(-len(x) // parts)  # equal parts, so that none is too small to fill the device
    memory = x.new_empty(each, geometry.mixtures, o, i)  # used again for each part
    for first in range(0, len(x), each):
        part = slice(first, min(first + each, len(x)))
        kernels = memory[: part.stop - first]
        if filled:
            mix_into(kernels, weights[part], basis)
        yield part, kernels.view(-1, *geometry.grid, o, i)


def _is_matrix(geometry: Geometry) -> bool:
    """Whether a kernel in memory is a matrix `(C_out, C_in)`, applied at each position."""
    return geometry.is_pointwise and geometry.grid[2] == 1


def _matrix(kernels: Tensor) -> Tensor:
    """`(b, 1, R, 1, o, i)` as `(b, C_out, C_in)`."""
    return kernels.view(len(kernels), -1, kernels.shape[5])


def _grad_input(grad: Tensor, kernels: Tensor, geometry: Geometry, out: Tensor) -> None:
    if _is_matrix(geometry):
        _product(_matrix(kernels).transpose(1, 2), grad.flatten(2), out.flatten(2))
    else:
        implicit.grad_input(grad, kernels, geometry, out)


def _grad_kernels(grad: Tensor, x: Tensor, geometry: Geometry, out: Tensor) -> None:
    if _is_matrix(geometry):
        torch.bmm(grad.flatten(2), x.flatten(2).transpose(1, 2), out=_matrix(out))
    else:
        implicit.grad_kernels(grad, x, geometry, out)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, batched; `b` and `out` may be row-major or column-major."""
    if out.stride(1) == 1 and out.shape[2] > 1:  # channels last
        torch.bmm(b.transpose(1, 2), a.transpose(1, 2), out=out.transpose(1, 2))
    else:
        torch.bmm(a, b, out=out)


def applies(x: Any, geometry: Geometry) -> bool:
    """Whether this implementation can compute the layer for this input, with the software and device at hand."""
    return (
        implicit.AVAILABLE
        and x.dtype in implicit.DTYPES
        and geometry.groups == 1
        and not geometry.spans_positions
        and (len(x.shape) <= 4 or _is_matrix(geometry))
        and (implicit.INTERPRETED if x.device.type == "cpu" else implicit.runs_on(x.device))
    )
