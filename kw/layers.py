"""Dynamic layers of KernelWarehouse, with the arguments of torch's static ones (paper, section 3.1).

The forward pass pools the input over space, computes attentions over the warehouse's cells from it (attention.py),
and assembles and applies a kernel for each sample (functional.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw import functional
from kw.attention import Attention
from kw.compute import Geometry
from kw.compute.tracing import leaf
from kw.warehouse import Share, Warehouse

Size = int | tuple[int, ...]


class DynamicLayer(nn.Module):
    """A layer whose kernel depends on each sample of its input: the layers below, and those of `kw.baselines`.

    `attention` is the module that computes weights from the input; None where the method needs none. A method of
    `kw.baselines` that can begin from a static kernel has a function `set_kernel(kernel)`. `trained_when_frozen` names
    the submodules that a detector trains in its frozen stages too.
    """

    attention: Any
    set_kernel: Any = None
    trained_when_frozen: tuple[str, ...] = ()
    _setting: functional.Setting | None = None  # of the last forward pass, for activation checkpointing

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the static layer's kernel: `(C_out, C_in / groups, *kernel_size)`."""
        raise NotImplementedError


class KWLayer(DynamicLayer):
    """Base of convolutions and linear layers: a share of a warehouse, an attention, a static bias.

    Args:
        channels: input channels, all groups together.
        geometry: how the kernel is cut and applied.
        share: the layer's share of its warehouse. The layer has the warehouse as its submodule, as all others that
            share it do; only the first of them lists it among its children.
        bias: whether a static bias `(C_out,)` is added.

    Raises:
        RuntimeError: in `forward`, the cells are on another device than the input, or sharded.
    """

    share: Share
    attention: Attention
    warehouse: Warehouse

    def __init__(self, channels: int, share: Share, geometry: Geometry, bias: bool):
        nn.Module.__init__(self)
        self.share = share
        self.layer_name, self.geometry = share.kernel.name, geometry
        self.warehouse = share.warehouse
        self.warehouse.owners.add(self)
        self.attention = Attention(channels, share)
        self.bias = nn.Parameter(torch.zeros(share.kernel.channels_out)) if bias else None

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.share.kernel.shape

    def own_parameters(self) -> list[nn.Parameter]:
        """The layer's parameters without its warehouse's cells, which it shares."""
        return [parameter for parameter in self.parameters() if parameter is not self.warehouse.cells]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As in `nn.Module`, but the warehouse is a child of the first of its layers only. Tools that walk through
        children, and know nothing of shared ones, then visit it once."""
        for name, child in super().named_children():
            if child is not self.warehouse or self.warehouse.owners.first() is self:
                yield name, child

    def _apply(self, fn: Any, recurse: bool = True) -> KWLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse and self.warehouse.owners.first() is not self:  # torch applies it to children alone
            self.warehouse._apply(fn)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.warehouse.owners.add(self)

    def kernels(self, pooled: Tensor) -> Tensor:
        """Pooled input `(B, C_in)` to each sample's kernel `(B, C_out, C_in / groups, P)`."""
        kernels = functional.assemble(self.attention(pooled), self._cells_for(pooled), self.share.grid)
        return kernels.view(*kernels.shape[:2], self.share.kernel.channels_in, self.share.kernel.positions)

    def _compute(self, x: Tensor, pooled: Tensor) -> Tensor:
        """`(B, C_in, *space)` and its mean over space, `(B, C_in)`, to the output `(B, C_out, *out)`."""
        attention, cells = self.attention, self._cells_for(x)
        features = attention.features if attention.is_affine else None
        needs_grad = attention.fc2.weight.requires_grad
        make, apply = functional.choose(
            functional.setting_of(self), x, cells, self.geometry, features, needs_grad=needs_grad
        )
        folded = make == "folded"
        weights, basis = attention(pooled, folded), attention.fold(cells) if folded else cells
        return functional.compute(x, weights, basis, self.geometry, apply, self.bias)

    def _cells_for(self, x: Tensor) -> Tensor:
        """The warehouse's cells, which must be on the device of `x`: products of tensors on different devices are not
        always refused."""
        cells: Tensor = self.warehouse()
        if self.warehouse.is_sharded and cells.untyped_storage().size() == 0:
            raise self.warehouse.sharded_error()  # FSDP has freed them already
        if cells.device != x.device:
            raise RuntimeError(
                f"Layer {self.layer_name!r} has an input on {x.device}, and the cells of its warehouse "
                f"{self.warehouse.name!r} are on {cells.device}."
            )
        return cells

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"Layer {self.layer_name!r} is dynamic: it computes a kernel for each sample and has no 'weight'. "
                f"If the model reads this weight itself, leave the layer out of the scope."
            )
        return super().__getattr__(name)

    def _check_kernel(self, shape: tuple[int, ...]) -> None:
        if self.kernel_shape != shape:
            raise ValueError(
                f"Layer {self.layer_name!r} has a kernel of shape {shape}, but its share of the warehouse is for "
                f"{self.kernel_shape}."
            )


class OnTokens:
    """The forward pass of a linear layer, `(B, *, C_in)` to `(B, *, out_features)`, around `_compute`. The output is
    contiguous. `(C_in,)`, without batch, is one sample."""

    in_features: int
    out_features: int
    _compute: Callable[[Tensor, Tensor], Tensor]

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        x = input
        if x.dim() == 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if _is_empty(x):
            return _of_nothing(self, F.linear(x, x.new_zeros(self.out_features, self.in_features)))
        tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)  # (B, S, C_in)
        pooled = x.mean(dim=tuple(range(1, x.dim() - 1))) if x.dim() > 2 else x
        out = self._compute(tokens.transpose(1, 2), pooled)
        return out.transpose(1, 2).reshape(*x.shape[:-1], self.out_features).contiguous()


class OnPositions:
    """The forward pass of a convolution, `(B, in_channels, *space)` to `(B, C_out, *out)`, around `_compute`.

    `extra_padding` is what `F.pad` adds first, if anything; the convolution itself only pads with zeros, by the same
    number on both sides.
    """

    layer_name: str
    dims: int
    in_channels: int
    padding_mode: str
    extra_padding: list[int] | None
    kernel_shape: tuple[int, ...]
    geometry: Geometry
    _compute: Callable[[Tensor, Tensor], Tensor]

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        x = input
        if x.dim() != self.dims + 2:
            raise ValueError(
                f"Layer {self.layer_name!r} takes a batch of shape (B, {self.in_channels}, "
                f"{self.dims} spatial dimensions), not {tuple(x.shape)}."
            )
        pooled = x.flatten(2).mean(dim=2)
        if self.extra_padding is not None:
            x = F.pad(x, self.extra_padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        if _is_empty(x):
            g, convolve = self.geometry, (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
            kernel = x.new_zeros(self.kernel_shape)
            return _of_nothing(self, convolve(x, kernel, None, g.stride, g.padding, g.dilation, g.groups))
        return self._compute(x, pooled)


def _is_empty(x: Tensor) -> bool:
    """Whether `x` has no entry, as where no region was proposed: there is nothing to pool."""
    return not torch.jit.is_tracing() and 0 in x.shape  # type: ignore[attr-defined, no-untyped-call]


def _of_nothing(layer: Any, out: Tensor) -> Tensor:
    """The empty output `out`, from which every parameter of the layer gets a gradient of zeros, as in static layers."""
    gradients: Tensor = sum(parameter.sum().to(out) for parameter in layer.parameters())
    return out + gradients


class KWLinear(OnTokens, KWLayer):
    """`nn.Linear` on `(B, *, C_in)`; the attention sees the mean over all dimensions between batch and channels.
    `(C_in,)` is one sample.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        share: of a warehouse that lists the kernel `(out_features, in_features)`.

    Raises:
        ValueError: the share is for a kernel of another shape.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, share: Share):
        KWLayer.__init__(self, in_features, share, Geometry(share.grid), bias)
        self._check_kernel((out_features, in_features))
        self.in_features, self.out_features = in_features, out_features

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, warehouse={self.warehouse.name!r}"


class _KWConvNd(OnPositions, KWLayer):
    """A convolution of `dims` dimensions.

    Args:
        share: of a warehouse that lists the kernel `(out_channels, in_channels / groups, *kernel_size)`. The other
            arguments are those of `nn.Conv2d`.

    Raises:
        ValueError: the share is for a kernel of another shape; or, in `forward`, the input has no batch dimension.
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
        share: Share,
    ):
        kernel_size, stride, dilation = map(self._per_dim, (kernel_size, stride, dilation))
        padding = padding if isinstance(padding, str) else self._per_dim(padding)
        zeros, extra = paddings(padding, kernel_size, dilation, padding_mode)
        KWLayer.__init__(
            self, in_channels, share, Geometry(share.grid, kernel_size, stride, zeros, dilation, groups), bias
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.padding_mode, self.extra_padding = padding, padding_mode, extra
        self._check_kernel((out_channels, in_channels // groups, *kernel_size))

    def _per_dim(self, size: Size) -> tuple[int, ...]:
        return (size,) * self.dims if isinstance(size, int) else tuple(size)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if isinstance(self.padding, str) or any(self.padding) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        return f"{text}, warehouse={self.warehouse.name!r}"


class KWConv1d(_KWConvNd):
    """`nn.Conv1d` on `(B, C_in, L)`, with its arguments and the keyword `share`, a share of a warehouse."""

    dims = 1


class KWConv2d(_KWConvNd):
    """`nn.Conv2d` on `(B, C_in, H, W)`, with its arguments and the keyword `share`, a share of a warehouse."""

    dims = 2


class KWConv3d(_KWConvNd):
    """`nn.Conv3d` on `(B, C_in, D, H, W)`, with its arguments and the keyword `share`, as in `KWConv2d`."""

    dims = 3


def paddings(
    padding: tuple[int, ...] | str, kernel_size: tuple[int, ...], dilation: tuple[int, ...], mode: str
) -> tuple[tuple[int, ...], list[int] | None]:
    """Divide a convolution's padding in two: zeros on both sides of each dimension, for the convolution itself; and
    what `F.pad` adds before it, or None. `F.pad` does all padding that is not zeros, and where padding="same" needs one
    position more behind than in front, that position."""
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel_size, strict=True)]
    else:
        totals = [2 * pad for pad in padding]
    if mode != "zeros":
        return (0,) * len(totals), [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    odd = [side for total in reversed(totals) for side in (0, total % 2)]
    return tuple(total // 2 for total in totals), odd if any(odd) else None
