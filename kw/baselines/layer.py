"""What the baselines' layers have in common: the arguments of `nn.Conv2d`, pooling, and a convolution per sample.

Shapes: `B` batch, `K` kernels in a layer, `P` positions of a kernel (kh * kw).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        return per_sample(x, kernels, self.stride, padding, self.dilation, self.groups)

    def add_bias(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)


class KernelBank(DynamicConv2d):
    """A layer of K kernels, from which each sample's is mixed: `attention` gives the shares `(B, K)`.

    `weight` is `(K, C_out, C_in / groups * P)`, in three dimensions so that no memory format applies to it.

    Args:
        n: the number of kernels, K.
    """

    def __init__(self, *args: Any, n: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.n = n
        self.weight = nn.Parameter(torch.empty(n, self.out_channels, self.weight[0].numel()))
        self.reset_parameters()

    def mixed(self, shares: Tensor) -> Tensor:
        """`(B, K)` to each sample's kernel `(B, C_out, C_in / groups, kh, kw)`, by one product."""
        kernels = shares.to(self.weight.dtype) @ self.weight.flatten(1)
        return kernels.view(len(shares), *self.kernel_shape)

    def only(self) -> Tensor:
        """The kernel of a layer that has one: `(C_out, C_in / groups, kh, kw)`."""
        return self.weight.view(self.kernel_shape)

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.only() if self.attention is None else self.mixed(self.attention(pool(x)))
        return self.add_bias(self.convolve(x, kernels))

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
