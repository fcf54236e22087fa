"""Layers whose kernel is assembled, per sample, from the cells of a warehouse: drop-ins for torch's static ones.

Forward: pool the input over space, score cells (attention.py), assemble a kernel per sample and apply it
(functional.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw import functional
from kw.attention import Attention
from kw.warehouse import Draw, Warehouse

Size = int | tuple[int, ...]


class DynamicLayer(nn.Module):
    """A layer whose kernel depends on its input, sample by sample: those below, and those of `kw.baselines`.

    All that scores the input is in its `attention`, which is None where there is nothing to score.
    """

    attention: Any

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Of the static layer's kernel: `(C_out, C_in / groups, *kernel_size)`."""
        raise NotImplementedError


class KWLayer(DynamicLayer):
    """What convolutions and linear layers share: a draw from a warehouse, an attention, a static bias.

    Args:
        channels: input channels, all groups together.
        draw: the layer's share in its warehouse. The warehouse is referred to, not registered: one owner, the model,
            registers it, so that its cells are saved, moved and optimized once.
        bias: whether a static bias `(C_out,)` is added.
    """

    draw: Draw
    attention: Attention

    def __init__(self, channels: int, draw: Draw, bias: bool):
        super().__init__()
        self.__dict__["draw"] = draw  # past nn.Module's registration: one owner saves, moves and optimizes the cells
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


class KWLinear(KWLayer):
    """`nn.Linear` on `(B, *, C_in)`: the attention sees the mean over every dimension between batch and channels.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        draw: from a warehouse that lists the kernel `(out_features, in_features)`.

    Raises:
        ValueError: the draw is for a kernel of another shape.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, draw: Draw):
        super().__init__(in_features, draw, bias)
        self._check_kernel((out_features, in_features))
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=tuple(range(1, x.dim() - 1))) if x.dim() > 2 else x
        return functional.linear(x, self.attention(pooled), self.warehouse.drawn(), self.draw.grid, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, warehouse={self.warehouse.name!r}"


class _KWConvNd(KWLayer):
    """`nn.Conv1d`, `2d`, `3d` on `(B, C_in, *space)`; arguments as there, and `draw`, keyword only.

    The draw is from a warehouse that lists the kernel `(out_channels, in_channels / groups, *kernel_size)`.

    Raises:
        ValueError: the draw is for a kernel of another shape, or the input has no batch dimension.
    """

    dims: int

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
        super().__init__(in_channels, draw, bias)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = map(self._per_dim, (kernel_size, stride, dilation))
        self.padding = padding if isinstance(padding, str) else self._per_dim(padding)
        self.padding_mode = padding_mode
        self._check_kernel((out_channels, in_channels // groups, *self.kernel_size))

    def _per_dim(self, size: Size) -> tuple[int, ...]:
        return (size,) * self.dims if isinstance(size, int) else tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.dims + 2:
            raise ValueError(
                f"Layer {self.draw.kernel.name!r} takes a batch of shape (B, {self.in_channels}, "
                f"{self.dims} spatial dimensions), not {tuple(x.shape)}."
            )
        alpha = self.attention(x.flatten(2).mean(dim=2))
        padding: tuple[int, ...] | str = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._explicit_padding(), mode=self.padding_mode), (0,) * self.dims
        return functional.convolution(
            x,
            alpha,
            self.warehouse.drawn(),
            self.draw.grid,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.bias,
        )

    def _explicit_padding(self) -> list[int]:
        """Padding as `F.pad` wants it: last dimension first, a pair each."""
        pairs = []
        for size, dilation, pad in zip(self.kernel_size, self.dilation, self._numbers(), strict=True):
            total = dilation * (size - 1) if self.padding == "same" else 2 * pad
            pairs.append((total // 2, total - total // 2))
        return [side for pair in reversed(pairs) for side in pair]

    def _numbers(self) -> tuple[int, ...]:
        return (0,) * self.dims if isinstance(self.padding, str) else self.padding

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if self._numbers() != (0,) * self.dims else ""
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


def drop_unused_warehouses(model: nn.Module) -> None:
    """Take warehouses out of `model` that no layer draws from any longer: their cells would get no gradient."""
    used = {layer.warehouse for layer in model.modules() if isinstance(layer, KWLayer)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Warehouse) and child not in used:
                delattr(parent, name)
