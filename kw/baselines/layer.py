"""Bases of the baselines' layers: the arguments of `nn.Conv2d`, pooling, and a convolution per sample.

Shapes: `B` batch, `K` kernels in a layer, `P` positions of a kernel (kh * kw).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kw import functional
from kw.attention import size
from kw.compute import Geometry, batched, grouped
from kw.compute.tracing import is_recorded, is_transformed, leaf
from kw.layers import DynamicLayer, paddings
from kw.temperature import Tempered

MIN_HIDDEN = 16  # hidden width of an attention, as in ODConv and KernelWarehouse: a few units could all be dead
CAF = "caf"  # value of `attention_function` for that of KernelWarehouse, in methods that have another
HOTTEST = 30.0  # temperature of a softmax when training begins (DY-Conv, section 3.3)


class DynamicConv2d(DynamicLayer, nn.Conv2d):
    """`nn.Conv2d` on `(B, C_in, H, W)`, with its arguments and its static parameters `weight` and `bias`.

    A method adds `attention`, a module that computes weights from the input, and `forward`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        if isinstance(groups, bool):
            raise TypeError(f"groups={groups} must be a number, as in nn.Conv2d, whose bias comes after it.")
        super().__init__(*args, **kwargs)
        self.attention = None
        padding = self.padding if isinstance(self.padding, str) else tuple(self.padding)
        self.zeros, self.extra_padding = paddings(padding, self.kernel_size, self.dilation, self.padding_mode)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def positions(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def geometry(self) -> Geometry:
        """With a kernel that is one cell at each position."""
        return Geometry((self.positions, 1, 1), self.kernel_size, self.stride, self.zeros, self.dilation, self.groups)

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels

    def reset_parameters(self) -> None:
        """He normal with the fan-out of a group, as in the published networks; zero for the bias."""
        nn.init.normal_(self.weight, std=math.sqrt(2 * self.groups / (self.out_channels * self.positions)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """The convolution without bias, with one kernel `(C_out, C_in / groups, kh, kw)` for all samples, or one for
        each, `(B, C_out, C_in / groups, kh, kw)`."""
        x = self._padded(x)
        if kernels.dim() == 4:
            return F.conv2d(x, kernels, None, self.stride, self.zeros, self.dilation, self.groups)
        apply = batched if is_recorded(x.shape) or is_transformed() else grouped
        out: Tensor = apply.per_sample(x, kernels, self.geometry)
        return out

    def _padded(self, x: Tensor) -> Tensor:
        """The input after padding that is not zeros, or not the same on both sides."""
        if self.extra_padding is None:
            return x
        return F.pad(x, self.extra_padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def add_bias(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)


class KernelBank(DynamicConv2d):
    """A layer of K kernels, from which each sample's is mixed with the weights `(B, K)` of `attention`.

    `weight` is `(K * P, C_out, C_in / groups)`, the positions of a kernel one after the other. That is the layout of
    cells in a warehouse, so that the implementations of KernelWarehouse's layers apply. As there, a gradient of a
    gradient and torch.func need `kw.functional.use("grouped")`.

    Args:
        n: the number of kernels, K.
    """

    def __init__(self, *args: Any, n: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.n = n
        self.weight = nn.Parameter(torch.empty(n * self.positions, *self.kernel_shape[:2]))
        self.reset_parameters()

    def basis(self) -> Tensor:
        """The kernels as a basis of the mixture at each position (kw/compute/mixing.py):
        `(K, P, C_out, C_in / groups)`."""
        return self.weight.view(self.n, self.positions, *self.kernel_shape[:2])

    def convolve_mixed(self, x: Tensor, kernel: Tensor | None, space: Tensor | None = None) -> Tensor:
        """The convolution with each sample's kernel, without bias, with the implementation that suits the batch.

        Args:
            kernel: weights of the kernels, `(B, K)`; None if there is one kernel.
            space: factors for its positions, `(B, P)`.
        """
        basis = self.basis()
        if kernel is None and space is None:
            return self.convolve(x, basis[0].permute(1, 2, 0).reshape(self.kernel_shape))
        x, weights = self._padded(x), self._weights(kernel, space)
        geometry = self.geometry
        setting = functional.setting_of(self)
        choice = functional.choose(setting, x, basis, geometry, needs_grad=weights.requires_grad, makes=("folded",))
        return functional.compute(x, weights, basis, geometry, choice.apply)

    def _weights(self, kernel: Tensor | None, space: Tensor | None) -> Tensor:
        """The weight of each kernel at each position, `(B, P, K)`."""
        if kernel is None:
            assert space is not None
            return space[..., None]
        weights = kernel[:, None] if space is None else kernel[:, None] * space[..., None]
        return weights.expand(-1, self.positions, -1)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        weights = None if self.attention is None else self.attention(pool(x))
        return self.add_bias(self.convolve_mixed(x, weights))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, n={self.n}"


class AnnealedSoftmax(Tempered):
    """Scores `(B, K)` to weights that sum to 1. A high temperature makes them similar, so that at first all kernels
    learn.

    tau of `kw.set_temperature` goes from 1 when training begins to 0 in a trained model. The softmax has the
    temperature 1 + 29 tau, so that it falls from 30 to 1, linearly over the warm-up.
    """

    def forward(self, scores: Tensor) -> Tensor:
        if self.shared.is_zero:
            return scores.softmax(dim=1)
        return torch.softmax(scores / (1 + (HOTTEST - 1) * self.temperature.to(scores.device)), dim=1)


class AnchoredContrast(Tempered):
    """Scores `(B, K)` to weights by KernelWarehouse's attention function (`attention_function="caf"`):

        alpha = tau * beta + (1 - tau) * z / (sum_k |z_k| + 1e-3)

    beta is 1 for the first kernel: a layer has one mixture here, which has one anchor. Unlike in KernelWarehouse, there
    is no zero cell.
    """

    def forward(self, scores: Tensor) -> Tensor:
        weights = scores / size(scores[:, None])[:, 0]
        if self.shared.is_zero:
            return weights
        tau = self.temperature.to(weights)
        anchor = F.pad(tau.new_ones(1), (0, scores.shape[1] - 1))
        return tau * anchor + (1 - tau) * weights


def pool(x: Tensor) -> Tensor:
    """The mean over space, `(B, C, H, W)` to `(B, C)`. Raises ValueError for an input without these dimensions."""
    if x.dim() != 4:
        raise ValueError(f"A dynamic convolution takes a batch of shape (B, C, H, W), not {tuple(x.shape)}.")
    return x.mean(dim=(2, 3))


def he_normal(attention: nn.Module) -> None:
    """He normal with fan-out for an attention's linear layers; zero for their biases."""
    for layer in attention.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
