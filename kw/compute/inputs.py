"""Implementation "inputs": mix the inputs in place of the cells. It pays where a kernel is applied at few positions,
one or four.

A convolution with a mixture of cells is a sum over cells, of each cell's product with a mixture of the input's taps:

    out[s] = sum_t (sum_j alpha[t, j] cell_j) @ tap_t[s] = sum_j cell_j @ (sum_t alpha[t, j] tap_t[s])

So no kernel is assembled. The inner sum is a small product per position, the outer one a single large product for the
batch with the cells side by side. An output group takes `n * S / T` products with a cell in place of `n + S`.

Shapes: `B` batch, `S` output positions, `T = P * C_in / i` cells that an output group reads, `R = C_out / o` groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kw.compute.geometry import Geometry, in_layout_of
from kw.compute.strips import Strips


def forward(x: Tensor, alpha: Tensor, cells: Tensor, geometry: Geometry) -> Tensor:
    """For `groups == 1`, and a basis that all mixtures share."""
    n, o, i = cells.shape
    P, R, C = geometry.grid
    strips = Strips(tuple(x.shape[2:]), geometry)
    laid = strips.lay(x)
    reads = [strips.outputs(strips.reads(laid, tap)).flatten(2) for tap in strips.taps]
    taps = torch.stack(reads, dim=1).permute(0, 3, 1, 2)  # (B, S, P, C_in)
    batch, positions = taps.shape[:2]
    by_group = alpha.view(batch, 1, P, R, C, n).permute(0, 1, 3, 5, 2, 4).reshape(batch, 1, R * n, P * C)
    mixed = by_group @ taps.reshape(batch, positions, P * C, i)  # (B, S, R * n, i)
    side_by_side = cells.transpose(1, 2).reshape(n * i, o)
    out = mixed.view(batch * positions * R, n * i) @ side_by_side
    return in_layout_of(x, torch.unflatten(out.view(batch, positions, R * o).transpose(1, 2), 2, strips.out))
