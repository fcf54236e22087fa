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
from kw.compute import Geometry
from kw.compute.grouped import per_sample
from kw.layers import DynamicLayer
from kw.temperature import Tempered

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

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Padded by what is not zeros, or is not the same on both sides; and the padding that is left to do."""
        pads = list(self._reversed_padding_repeated_twice)  # left, right, above, below
        even = (pads[2], pads[0])
        if self.padding_mode != "zeros":
            return F.pad(x, pads, mode=self.padding_mode), (0, 0)
        odd = [0, pads[1] - pads[0], 0, pads[3] - pads[2]]
        return (F.pad(x, odd) if any(odd) else x), even

    def add_bias(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)


class KernelBank(DynamicConv2d):
    """A layer of K kernels, from which each sample's is mixed: `attention` gives the shares `(B, K)`.

    `weight` is `(K * P, C_out, C_in / groups)`, the positions of a kernel one after the other: laid out as the cells of
    a warehouse, so that the implementations of KernelWarehouse's layers serve here too. As there, a gradient of a
    gradient and torch.func take `kw.functional.use("grouped")`.

    Args:
        n: the number of kernels, K.
    """

    def __init__(self, *args: Any, n: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.n = n
        self.weight = nn.Parameter(torch.empty(n * self.positions, *self.kernel_shape[:2]))
        self.reset_parameters()

    def basis(self) -> Tensor:
        """The kernels, as bases of the mixtures at each position: `(K, P, C_out, C_in / groups)`."""
        return self.weight.view(self.n, self.positions, *self.kernel_shape[:2])

    def convolve_mixed(self, x: Tensor, shares: Tensor | None, space: Tensor | None = None) -> Tensor:
        """The convolution with each sample's kernel, without bias, by the implementation that suits the batch.

        Args:
            shares: `(B, K)` of the kernels in it; None where there is one kernel.
            space: `(B, P)`, what its positions are multiplied by.
        """
        basis = self.basis()
        if shares is None and space is None:
            return self.convolve(x, basis[0].permute(1, 2, 0).reshape(self.kernel_shape))
        x, padding = self._padded(x)
        weights = self._weights(shares, space)
        geometry = Geometry((self.positions, 1, 1), self.kernel_size, self.stride, padding, self.dilation, self.groups)
        setting = functional.setting_of(self)
        applied = functional.choose(
            setting, x, basis, geometry, needs_grad=weights.requires_grad, makes=("folded",)
        ).apply
        return functional.compute(x, weights, basis, geometry, applied)

    def _weights(self, shares: Tensor | None, space: Tensor | None) -> Tensor:
        """Of the kernels at each position, `(B, P, K)`."""
        if shares is None:
            assert space is not None
            return space[..., None]
        weights = shares[:, None] if space is None else shares[:, None] * space[..., None]
        return weights.expand(-1, self.positions, -1)

    def forward(self, x: Tensor) -> Tensor:
        shares = None if self.attention is None else self.attention(pool(x))
        return self.add_bias(self.convolve_mixed(x, shares))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, n={self.n}"


class AnnealedSoftmax(Tempered):
    """Scores `(B, K)` to shares that sum to 1. A high temperature makes them alike, so that at first all kernels learn.

    `temperature` is tau of `kw.set_temperature`, from 1 when training begins to 0 in a trained model: the
    softmax is at 1 + 29 tau, so that it goes from 30 to 1, linearly, over the epochs of the warm-up.
    """

    def forward(self, scores: Tensor) -> Tensor:
        if self.shared.is_zero:
            return scores.softmax(dim=1)
        return torch.softmax(scores / (1 + (HOTTEST - 1) * self.temperature.to(scores.device)), dim=1)


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
