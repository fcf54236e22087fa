"""Dynamic convolution decomposition, DCD (Li et al., ICLR 2021, arXiv 2103.08756): a scaled static kernel plus a
residual of low rank, both from the sample, section 4.

    W = Lambda(x) W0 + P Phi(x) Q^T

Shapes: W and W0 are `(C_out, C_in / groups * kh * kw)`, Lambda `(B, C_out)` a diagonal, P `(C_out, L)`, Phi
`(B, L, L)`, Q^T `(L, C_in / groups * kh * kw)`. Lambda and Phi are linear in `relu(fc1(pool(x)))`, `C_in / 16` wide (at
least 16), before their sigmoid and tanh.

Without groups it is computed in parts, with convolutions that all samples share, and no sample's kernel is assembled:

    W conv x = Lambda (W0 conv x) + (P Phi) (Q^T conv x)

Depthwise and grouped kernels are small, and are assembled.

Differs from the paper: the latent width L is the square root of the lesser of C_in and C_out (equal in the paper), and
at most the rank that the kernel can have. In a kernel of several positions Q spans all of them, where the paper factors
positions again; that takes more multiply-adds. Lambda is a sigmoid and Phi a tanh. Without bounds, outputs would grow
with the square of inputs, and a deep network would overflow until its norms have statistics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kw.baselines.layer import MIN_HIDDEN, DynamicConv2d, he_normal, pool
from kw.baselines.registry import register
from kw.compute.tracing import leaf

REDUCTION = 16


class Coefficients(nn.Module):
    """Pooled features `(B, C_in)` to Lambda `(B, C_out)` and Phi `(B, L, L)`."""

    def __init__(self, channels_in: int, channels_out: int, latent: int):
        super().__init__()
        self.latent = latent
        self.fc1 = nn.Linear(channels_in, max(channels_in // REDUCTION, MIN_HIDDEN), bias=False)
        self.scale = nn.Linear(self.fc1.out_features, channels_out)
        self.phi = nn.Linear(self.fc1.out_features, latent * latent)
        he_normal(self)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        h = self.fc1(pooled).relu()
        return self.scale(h).sigmoid(), self.phi(h).tanh().view(pooled.shape[0], self.latent, self.latent)


@register("dcd", budget=False)
class DCDConv2d(DynamicConv2d):
    """`nn.Conv2d` with a scaled kernel and a dynamic residual of low rank; equations above."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        taps = self.kernel_shape[1:]
        latent = min(math.isqrt(min(self.in_channels, self.out_channels)), math.prod(taps))
        self.attention = Coefficients(self.in_channels, self.out_channels, latent)
        self.p = nn.Parameter(torch.randn(self.out_channels, latent) / latent)  # so that the residual is as large as W0
        self.q = nn.Parameter(torch.randn(latent, *taps) / math.sqrt(math.prod(taps)))

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        scale, phi = self.attention(pool(x))
        mixing = self.p @ phi  # (B, C_out, L)
        if self.groups == 1:
            out = self.convolve(x, self.weight) * scale[..., None, None]
            return self.add_bias(out + (mixing @ self.convolve(x, self.q).flatten(2)).view(out.shape))
        residual = (mixing @ self.q.flatten(1)).view(x.shape[0], *self.kernel_shape)
        return self.add_bias(self.convolve(x, scale[..., None, None, None] * self.weight + residual))
