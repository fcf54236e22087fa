"""How a batch's kernels are made: each mixture of a sample is a weighted sum over a basis.

    mixture[b, t] = sum_j weights[b, t, j] * basis[j]        "cells": all mixtures share the cells of their warehouse
    mixture[b, t] = sum_j weights[b, t, j] * basis[j, t]     "folded": each mixture has its own basis

"folded" is possible where attentions are affine in the H hidden features of a sample, up to one factor for each
mixture. Then the cells are first summed into H + 1 kernels, one for each hidden feature and one for the constant term,
once a batch (`kw.attention.Attention.fold`). A sample's kernel is a weighted sum of these. That takes `|W| (H + 1)`
multiply-adds a sample in place of `|W| n`, and `|W| n (H + 1)` once a batch.

Shapes: `B` batch, `b` samples of it, `m = P * R * C` mixtures of a layer in the order of its grid, `J` terms of a sum,
`o` by `i` channels of a cell, `r` rows of it. `weights` are `(B, m, J)`, `basis` is `(J, o, i)` or `(J, m, o, i)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kw.compute.geometry import Grid
from kw.compute.narrow import NARROW, narrow_product
from kw.compute.product import product

PIECE = 1 << 20  # entries of the cells' gradient to add at a time, to stay in a CPU's cache


def is_shared(basis: Tensor) -> bool:
    """Whether all mixtures have the same basis."""
    return basis.dim() == 3


def mix(weights: Tensor, basis: Tensor) -> Tensor:
    """Each sample's mixtures, `(B, m, o, i)`; differentiable."""
    batch, m, terms = weights.shape
    o, i = basis.shape[-2:]
    if is_shared(basis):
        return (weights.reshape(-1, terms) @ basis.reshape(terms, o * i)).view(batch, m, o, i)
    if terms == 1:  # a product would be slower than scaling
        return weights[..., None] * basis[0]
    mixtures = torch.bmm(weights.transpose(0, 1), basis.flatten(2).transpose(0, 1))
    return mixtures.transpose(0, 1).reshape(batch, m, o, i)


def mix_into(out: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """`mix`, written to `out` (contiguous) without a copy. Without gradients."""
    flat = out.view(*weights.shape[:2], -1)
    if is_shared(basis):
        torch.mm(weights.reshape(-1, weights.shape[2]), basis.flatten(1), out=flat.view(-1, flat.shape[2]))
    else:
        torch.bmm(weights.transpose(0, 1), basis.flatten(2).transpose(0, 1), out=flat.transpose(0, 1))
    return out


def grad_weights(grad: Tensor, basis: Tensor) -> Tensor:
    """The gradient of the weights `(B, m, J)`, from that of the mixtures `(B, m, o, i)`. Contiguous, as the operator's
    fake implementation says; not differentiable."""
    grad = grad.flatten(2)
    if is_shared(basis):
        return (grad.flatten(0, 1) @ basis.flatten(1).t()).view(*grad.shape[:2], -1)
    out = grad.new_empty(*grad.shape[:2], len(basis))
    torch.bmm(grad.transpose(0, 1), basis.flatten(2).permute(1, 2, 0), out=out.transpose(0, 1))
    return out


def grad_basis(grad: Tensor, weights: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a basis of this shape, from that of the mixtures. Contiguous; not differentiable."""
    grad = grad.flatten(2)
    if len(shape) == 3:
        return (weights.reshape(-1, weights.shape[2]).t() @ grad.flatten(0, 1)).view(shape)
    out = grad.new_empty(shape)
    torch.bmm(weights.permute(1, 2, 0), grad.transpose(0, 1), out=out.flatten(2).transpose(0, 1))
    return out


class Block:
    """The mixtures of some samples and some rows of every cell, in the order (tap, input cell, sample, output cell):
    one matrix for each sample at each tap and input cell. Not differentiable.

    Args:
        weights: of these samples, `(b, m, J)`.
        basis: all of it.
        grid: `(P, R, C)`.
    """

    def __init__(self, weights: Tensor, basis: Tensor, grid: Grid):
        self.basis, self.grid, self.samples = basis, grid, weights.shape[0]
        by_grid = torch.unflatten(weights, 1, grid)  # (b, P, R, C, J)
        if is_shared(basis):
            self.weights = by_grid.permute(1, 3, 0, 2, 4).reshape(-1, weights.shape[2])  # (P * C * b * R, J)
        else:
            self.weights = by_grid.permute(1, 3, 2, 0, 4).reshape(
                -1, self.samples, weights.shape[2]
            )  # (P * C * R, b, J)

    def mix(self, rows: slice) -> Tensor:
        """`(P, C, b, R * r, i)`."""
        P, R, C = self.grid
        piece = self._piece(rows)
        if is_shared(self.basis):
            multiply = narrow_product if piece.dtype in NARROW else product
            mixtures = multiply(self.weights, piece)
        else:
            mixtures = torch.bmm(self.weights, piece).view(P, C, R, self.samples, -1).transpose(2, 3)
        return mixtures.reshape(P, C, self.samples, -1, self.basis.shape[-1])

    def add_grads(self, grad: Tensor, rows: slice, grad_weights: Tensor | None, grad_basis: Tensor | None) -> None:
        """Add what the gradient of `mix(rows)` adds to the gradients of the weights `(b, m, J)` and the basis."""
        P, R, C = self.grid
        terms = self.basis.shape[0]
        if is_shared(self.basis):
            grad = grad.reshape(P * C * self.samples * R, -1)
            if grad_weights is not None:
                of_weights = product(grad, self._piece(rows).t()).view(P, C, self.samples, R, terms)
                torch.unflatten(grad_weights, 1, self.grid).permute(1, 3, 0, 2, 4).add_(of_weights)
            if grad_basis is not None:
                self._add_in_pieces(grad_basis[:, rows], grad)
            return
        grad = grad.view(P, C, self.samples, R, -1).transpose(2, 3).reshape(P * C * R, self.samples, -1)
        if grad_weights is not None:
            of_weights = torch.bmm(grad, self._piece(rows).transpose(1, 2)).view(P, C, R, self.samples, terms)
            torch.unflatten(grad_weights, 1, self.grid).permute(1, 3, 2, 0, 4).add_(of_weights)
        if grad_basis is not None:
            of_basis = torch.bmm(self.weights.transpose(1, 2), grad).view(P, C, R, terms, -1, self.basis.shape[-1])
            torch.unflatten(grad_basis, 1, self.grid)[..., rows, :].permute(1, 3, 2, 0, 4, 5).add_(of_basis)

    def _piece(self, rows: slice) -> Tensor:
        """Some rows of the basis, as matrices: `(J, r * i)`, or `(P * C * R, J, r * i)`."""
        piece = self.basis[..., rows, :]
        if is_shared(self.basis):
            return piece.flatten(1)
        return torch.unflatten(piece, 1, self.grid).permute(1, 3, 2, 0, 4, 5).flatten(4).flatten(0, 2)

    def _add_in_pieces(self, total: Tensor, grad: Tensor) -> None:
        """`total += weights.T @ grad`, where `total` is `(J, r, i)`."""
        terms, _, i = total.shape
        few = max(1, PIECE // (terms * i))
        for rows, some in zip(torch.split(total, few, dim=1), torch.split(grad, few * i, dim=1), strict=True):
            rows.add_(product(self.weights.t(), some.contiguous()).view(rows.shape))
