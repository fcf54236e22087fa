"""What the baselines' layers have in common: the arguments of `nn.Conv2d`, pooling, and a convolution per sample.

Shapes: `B` batch, `K` kernels in a layer, `P` positions of a kernel (kh * kw).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw import functional
from kw.layers import DynamicLayer
from kw.ways.grouped import per_sample

MIN_HIDDEN = 16  # of an attention, as in ODConv and KernelWarehouse: of a few units all may be dead from the start
HOTTEST = 30.0  # temperature of a softmax when training begins (DY-Conv, section 3.3)


class DynamicConv2d(DynamicLayer, nn.Conv2d):
    """A drop-in for `nn.Conv2d` on `(B, C_in, H, W)`; arguments and the static parameters `weight`, `bias` as there.

    What a method adds: an `attention`, a module that scores the input, and `forward`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.attention = None

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def positions(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels

    def reset_parameters(self) -> None:
        """He normal, fan-out of a group, as the published networks; zero for the bias."""
        nn.init.normal_(self.weight, std=math.sqrt(2 * self.groups / (self.out_channels * self.positions)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """The convolution without bias, with a kernel `(C_out, C_in / groups, kh, kw)` for all samples or one each,
        `(B, C_out, C_in / groups, kh, kw)`."""
        if kernels.dim() == 4:
            out: Tensor = self._conv_forward(x, kernels, None)
            return out
        x, padding = self._padded(x)
        return per_sample(x, kernels, self.stride, padding, self.dilation, self.groups)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """Padded by what is not zeros, and the padding that is left to do."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)

    def add_bias(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)


class KernelBank(DynamicConv2d):
    """A layer of K kernels, from which each sample's is mixed: `attention` gives the shares `(B, K)`.

    `weight` is `(K * P, C_out, C_in / groups)`, the positions of a kernel one after the other: laid out as the cells of
    a warehouse, so that the ways to compute KernelWarehouse's layers serve here too. As there, a gradient of a gradient
    and torch.func take `kw.functional.use("grouped")`.

    Args:
        n: the number of kernels, K.
    """

    def __init__(self, *args: Any, n: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.n = n
        self.weight = nn.Parameter(torch.empty(n * self.positions, *self.kernel_shape[:2]))
        self.reset_parameters()

    def mixed(self, shares: Tensor | None, space: Tensor | None = None) -> Tensor:
        """Each sample's kernel `(B, C_out, C_in / groups, kh, kw)`.

        Args:
            shares: `(B, K)` of the kernels in it; None where there is one kernel.
            space: `(B, P)`, what its positions are multiplied by.
        """
        kernels = self.weight.view(self.n, -1)
        if shares is not None:
            kernels = shares.to(kernels.dtype) @ kernels
        kernels = kernels.view(-1, self.positions, math.prod(self.kernel_shape[:2]))
        if space is not None:
            kernels = kernels * space[..., None]
        return kernels.transpose(1, 2).reshape(-1, *self.kernel_shape)

    def only(self) -> Tensor:
        """The kernel of a layer that has one: `(C_out, C_in / groups, kh, kw)`."""
        return self.mixed(None)[0]

    def convolve_mixed(self, x: Tensor, shares: Tensor | None, space: Tensor | None = None) -> Tensor:
        """The convolution with `mixed(shares, space)`, without bias, in the way that suits the batch."""
        if shares is None and space is None:
            return self.convolve(x, self.only())
        x, padding = self._padded(x)
        grid = (self.positions, 1, 1)
        x, task = functional.prepare(x, grid, self.kernel_size, self.stride, padding, self.dilation, self.groups)
        needs_grad = any(given is not None and given.requires_grad for given in (shares, space))
        way = functional.way_of(x, self.weight, task, needs_grad)
        if way == "grouped":  # which would mix all K * P numbers of a position, where K are its own
            return per_sample(x, self.mixed(shares, space), task.stride, task.padding, task.dilation, task.groups)
        return functional.compute(x, self._attentions(shares, space), self.weight, task, way=way)

    def _attentions(self, shares: Tensor | None, space: Tensor | None) -> Tensor:
        """As of a warehouse with a mixture for each position, `(B, P, K * P)`: to the same position of every kernel."""
        alpha = torch.eye(self.positions, dtype=self.weight.dtype, device=self.weight.device)[:, None]  # (P, 1, P)
        if shares is not None:
            alpha = alpha * shares[:, None, :, None]  # (B, P, K, P)
        if space is not None:
            alpha = alpha * space[:, :, None, None]
        return alpha.flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        shares = None if self.attention is None else self.attention(pool(x))
        return self.add_bias(self.convolve_mixed(x, shares))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, n={self.n}"


class AnnealedSoftmax(nn.Module):
    """Scores `(B, K)` to shares that sum to 1. A high temperature makes them alike, so that at first all kernels learn.

    The buffer `temperature` holds tau of `kw.set_temperature`, from 1 when training begins to 0 in a trained model: the
    softmax is at 1 + 29 tau, so that it goes from 30 to 1, linearly, over the epochs of the warm-up.
    """

    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.zeros(()))

    def forward(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores / (1 + (HOTTEST - 1) * self.temperature), dim=1)


def pool(x: Tensor) -> Tensor:
    """The mean over space, `(B, C, H, W)` to `(B, C)`. Raises ValueError for an input of another form."""
    if x.dim() != 4:
        raise ValueError(f"A dynamic convolution takes a batch of shape (B, C, H, W), not {tuple(x.shape)}.")
    return x.mean(dim=(2, 3))


def he_normal(attention: nn.Module) -> None:
    """He normal, fan-out, for an attention's linear layers; zero for their biases."""
    for layer in attention.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
