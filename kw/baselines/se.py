"""Squeeze-and-excitation (Hu et al., CVPR 2018, arXiv 1709.01507): output channels scaled for each sample, section 3.

    y = sigmoid(fc2(relu(fc1(pool(u))))) * u,    u = W conv x + b

Shapes: x `(B, C_in, H, W)`, u and y `(B, C_out, H', W')`. fc1 is C_out / 16 wide (at
least 16, where the paper has no bound).

Differs from the paper, which scales each block once, after its last norm: here each convolution is scaled, before the
norm that follows, so that the layer replaces a convolution as in the other methods. ResNet18 then has twice as many
attentions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kw.baselines.layer import MIN_HIDDEN, DynamicConv2d, he_normal, pool
from kw.baselines.registry import register
from kw.compute.tracing import leaf

REDUCTION = 16


class Excitation(nn.Module):
    """Pooled features `(B, C)` to a scale `(B, C)` in (0, 1)."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // REDUCTION, MIN_HIDDEN)
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        he_normal(self)

    def forward(self, pooled: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(pooled))))


@register("se", budget=False)
class SEConv2d(DynamicConv2d):
    """`nn.Conv2d` with its output channels scaled by squeeze-and-excitation; equations above."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.attention = Excitation(self.out_channels)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        out = self.add_bias(self.convolve(x, self.weight))
        scale: Tensor = self.attention(pool(out))
        return out * scale[..., None, None]
