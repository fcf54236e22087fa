"""Cells of a frozen model in bfloat16 or int8: for one image, reading the cells takes most of a layer's time.

int8 has a scale for each cell, the largest of its values over 127, which multiplies the attentions. The products are in
kw/compute/narrow.py.

Shapes: `B` batch, `m` mixtures, `n` cells of `o` by `i` channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kw import functional
from kw.compute.cost import applies
from kw.compute.tracing import is_recorded
from kw.layers import KWLayer, KWLinear, OnPositions, OnTokens
from kw.warehouse import Warehouse


class NarrowCells(nn.Module):
    """The cells of a warehouse in a narrow type, shared by its layers.

    Args:
        dtype: one of `NARROW`.
    """

    cells: Tensor  # (n, o, i)
    scale: Tensor  # (n,)

    def __init__(self, warehouse: Warehouse, dtype: torch.dtype):
        super().__init__()
        cells = warehouse.cells.detach()
        scale = cells.new_ones(len(cells))
        if dtype == torch.int8:
            scale = cells.abs().amax(dim=(1, 2)).clamp(min=torch.finfo(cells.dtype).tiny) / 127
            cells = (cells / scale[:, None, None]).round()
        self.register_buffer("cells", cells.to(dtype))
        self.register_buffer("scale", scale)

    def _apply(self, fn: Any, recurse: bool = True) -> NarrowCells:
        """The device changes, the narrow type does not."""
        dtype = self.cells.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.cells = self.cells.to(dtype)
        return self

    def extra_repr(self) -> str:
        n, o, i = self.cells.shape
        return f"{n} cells of {o} x {i} in {str(self.cells.dtype).removeprefix('torch.')}"


class NarrowLayer(nn.Module):
    """A dynamic layer, only evaluated, whose cells are narrow. It takes over the layer's attention and bias."""

    def __init__(self, layer: KWLayer, cells: NarrowCells):
        super().__init__()
        self.attention, self.bias, self.cells = layer.attention, layer.bias, cells
        self.layer_name, self.geometry, self.kernel_shape = layer.layer_name, layer.geometry, layer.kernel_shape

    def _compute(self, x: Tensor, pooled: Tensor) -> Tensor:
        """`(B, C_in, *space)` and its mean over space, `(B, C_in)`, to the output `(B, C_out, *out)`."""
        cells = self.cells.cells
        weights = self.attention(pooled)
        weights = (weights * self.cells.scale.to(weights.dtype)).to(x.dtype)
        if is_recorded(x.shape) or torch.compiler.is_compiling():
            return functional.compute(x, weights, cells.to(x.dtype), self.geometry, "batched", self.bias)
        apply = "blocks" if applies("blocks", "cells", x, self.geometry) else "grouped"
        return functional.compute(x, weights, cells, self.geometry, apply, self.bias)

    def extra_repr(self) -> str:
        return repr(self.layer_name)


class NarrowLinear(OnTokens, NarrowLayer):
    """`KWLinear` with narrow cells, on `(B, *, C_in)`."""

    def __init__(self, layer: KWLinear, cells: NarrowCells):
        NarrowLayer.__init__(self, layer, cells)
        self.in_features, self.out_features = layer.in_features, layer.out_features


class NarrowConv(OnPositions, NarrowLayer):
    """`KWConv1d`, `2d` or `3d` with narrow cells, on `(B, C_in, *space)`."""

    def __init__(self, layer: KWLayer, cells: NarrowCells):
        NarrowLayer.__init__(self, layer, cells)
        self.dims, self.in_channels = layer.dims, layer.in_channels
        self.padding_mode, self.extra_padding = layer.padding_mode, layer.extra_padding


def narrow(layer: KWLayer, cells: NarrowCells) -> NarrowLayer:
    """The layer with narrow cells."""
    return NarrowLinear(layer, cells) if isinstance(layer, KWLinear) else NarrowConv(layer, cells)
