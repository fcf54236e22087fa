"""Layers whose kernel is assembled, per sample, from the cells of a warehouse: drop-ins for torch's static ones.

Forward: pool the input over space, score cells (attention.py), assemble a kernel per sample and apply it
(functional.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw import functional
from kw.attention import Attention
from kw.compute import Geometry
from kw.warehouse import Draw, Warehouse

Size = int | tuple[int, ...]


class DynamicLayer(nn.Module):
    """A layer whose kernel depends on its input, sample by sample: those below, and those of `kw.baselines`.

    All that scores the input is in its `attention`, which is None where there is nothing to score.
    """

    attention: Any
    _setting: functional.Setting | None = None  # of the last forward pass, for activation checkpointing

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Of the static layer's kernel: `(C_out, C_in / groups, *kernel_size)`."""
        raise NotImplementedError


class KWLayer(DynamicLayer):
    """What convolutions and linear layers share: a draw from a warehouse, an attention, a static bias.

    Args:
        channels: input channels, all groups together.
        geometry: how the kernel is cut and applied.
        draw: the layer's share in its warehouse. The warehouse is referred to, not registered: one owner, the model,
            registers it, so that its cells are saved, moved and optimized once.
        bias: whether a static bias `(C_out,)` is added.
    """

    draw: Draw
    attention: Attention

    def __init__(self, channels: int, draw: Draw, geometry: Geometry, bias: bool):
        nn.Module.__init__(self)
        self.__dict__["draw"] = draw  # past nn.Module's registration: one owner saves, moves and optimizes the cells
        self.layer_name, self.geometry = draw.kernel.name, geometry
        self.attention = Attention(channels, draw)
        self.bias = nn.Parameter(torch.zeros(draw.kernel.channels_out)) if bias else None

    @property
    def warehouse(self) -> Warehouse:
        return self.draw.warehouse

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.draw.kernel.shape

    def kernels(self, pooled: Tensor) -> Tensor:
        """Pooled input `(B, C_in)` to each sample's kernel `(B, C_out, C_in / groups, P)`."""
        kernels = functional.assemble(self.attention(pooled), self.warehouse.cells, self.draw.grid)
        return kernels.view(*kernels.shape[:2], self.draw.kernel.channels_in, self.draw.kernel.positions)

    def _compute(self, x: Tensor, pooled: Tensor) -> Tensor:
        """`(B, C_in, *space)` and its mean over space, `(B, C_in)`, to the output `(B, C_out, *out)`."""
        attention, cells = self.attention, self.warehouse.drawn()
        features = attention.features if attention.is_affine else None
        needs_grad = attention.fc2.weight.requires_grad
        made, applied = functional.choose(
            functional.setting_of(self), x, cells, self.geometry, features, needs_grad=needs_grad
        )
        folded = made == "folded"
        weights, basis = attention(pooled, folded), attention.fold(cells) if folded else cells
        return functional.compute(x, weights, basis, self.geometry, applied, self.bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"Layer {self.draw.kernel.name!r} is dynamic: each sample has a kernel of its own, so there is no "
                f"'weight'. If the model reads this weight itself, leave the layer out of the scope."
            )
        return super().__getattr__(name)

    def _check_kernel(self, shape: tuple[int, ...]) -> None:
        if self.draw.kernel.shape != shape:
            raise ValueError(
                f"Layer {self.draw.kernel.name!r} has a kernel of shape {shape}, "
                f"but its draw is for {self.draw.kernel.shape}."
            )


class OnTokens:
    """The forward pass of a linear layer, `(B, *, C_in)` to `(B, *, out_features)`, with `_compute` to do it."""

    out_features: int
    _compute: Callable[[Tensor, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)  # (B, S, C_in)
        pooled = x.mean(dim=tuple(range(1, x.dim() - 1))) if x.dim() > 2 else x
        out = self._compute(tokens.transpose(1, 2), pooled)
        return out.transpose(1, 2).reshape(*x.shape[:-1], self.out_features)


class OnPositions:
    """The forward pass of a convolution, `(B, in_channels, *space)` to `(B, C_out, *out)`, with `_compute` to do it."""

    layer_name: str
    dims: int
    in_channels: int
    padding_mode: str
    beforehand: (
        list[int] | None
    )  # what `F.pad` does before the convolution, which pads by zeros, the same on both sides
    _compute: Callable[[Tensor, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.dims + 2:
            raise ValueError(
                f"Layer {self.layer_name!r} takes a batch of shape (B, {self.in_channels}, "
                f"{self.dims} spatial dimensions), not {tuple(x.shape)}."
            )
        pooled = x.flatten(2).mean(dim=2)
        if self.beforehand is not None:
            x = F.pad(x, self.beforehand, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        return self._compute(x, pooled)


class KWLinear(OnTokens, KWLayer):
    """`nn.Linear` on `(B, *, C_in)`: the attention sees the mean over every dimension between batch and channels.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        draw: from a warehouse that lists the kernel `(out_features, in_features)`.

    Raises:
        ValueError: the draw is for a kernel of another shape.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, draw: Draw):
        KWLayer.__init__(self, in_features, draw, Geometry(draw.grid), bias)
        self._check_kernel((out_features, in_features))
        self.in_features, self.out_features = in_features, out_features

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, warehouse={self.warehouse.name!r}"


class _KWConvNd(OnPositions, KWLayer):
    """`nn.Conv1d`, `2d`, `3d` on `(B, C_in, *space)`; arguments as there, and `draw`, keyword only.

    The draw is from a warehouse that lists the kernel `(out_channels, in_channels / groups, *kernel_size)`.

    Raises:
        ValueError: the draw is for a kernel of another shape, or the input has no batch dimension.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        draw: Draw,
    ):
        kernel_size, stride, dilation = map(self._per_dim, (kernel_size, stride, dilation))
        padding = padding if isinstance(padding, str) else self._per_dim(padding)
        zeros, beforehand = paddings(padding, kernel_size, dilation, padding_mode)
        KWLayer.__init__(
            self, in_channels, draw, Geometry(draw.grid, kernel_size, stride, zeros, dilation, groups), bias
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.padding_mode, self.beforehand = padding, padding_mode, beforehand
        self._check_kernel((out_channels, in_channels // groups, *kernel_size))

    def _per_dim(self, size: Size) -> tuple[int, ...]:
        return (size,) * self.dims if isinstance(size, int) else tuple(size)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if isinstance(self.padding, str) or any(self.padding) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        return f"{text}, warehouse={self.warehouse.name!r}"


class KWConv1d(_KWConvNd):
    dims = 1


class KWConv2d(_KWConvNd):
    dims = 2


class KWConv3d(_KWConvNd):
    dims = 3


for _layer in (KWConv1d, KWConv2d, KWConv3d):
    _layer.__doc__ = _KWConvNd.__doc__


def paddings(
    padding: tuple[int, ...] | str, kernel_size: tuple[int, ...], dilation: tuple[int, ...], mode: str
) -> tuple[tuple[int, ...], list[int] | None]:
    """Zeros on both sides of each dimension, which are the convolution's; and what `F.pad` does beforehand, if
    anything: padding that is not zeros, or that has one position more behind than in front."""
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel_size, strict=True)]
    else:
        totals = [2 * pad for pad in padding]
    if mode != "zeros":
        return (0,) * len(totals), [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    odd = [side for total in reversed(totals) for side in (0, total % 2)]
    return tuple(total // 2 for total in totals), odd if any(odd) else None


def drop_unused_warehouses(model: nn.Module) -> None:
    """Take warehouses out of `model` that no layer draws from any longer: their cells would get no gradient."""
    used = {layer.warehouse for layer in model.modules() if isinstance(layer, KWLayer)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Warehouse) and child not in used:
                delattr(parent, name)
