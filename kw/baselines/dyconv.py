"""DY-Conv (Chen et al., CVPR 2020, arXiv 1912.03458): kernels mixed by a softmax with annealed temperature, section 3.

    W = sum_k pi_k W_k,    pi = softmax(fc2(relu(fc1(pool(x)))) / T),    T from 30 to 1

Shapes: x `(B, C_in, H, W)`, pi `(B, K)`, W_k `(C_out, C_in / groups, kh, kw)`. fc1 is C_in / 4 wide (at least
16, where the paper has no bound). T falls with the temperature of `kw.set_temperature` (in the paper, over ten epochs).

Differs from the paper: at n = 1 the only weight would be 1, so the layer is a static convolution and has no attention.
The bias is static (the paper mixes it too; the convolutions of its networks have none).

With `attention_function="caf"`, pi is KernelWarehouse's attention function of the same scores, in place of the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kw.baselines.layer import CAF, MIN_HIDDEN, AnchoredContrast, AnnealedSoftmax, KernelBank, he_normal
from kw.baselines.registry import register

REDUCTION = 4
SOFTMAX = "softmax"


class KernelAttention(nn.Module):
    """Pooled features `(B, C)` to the weights `(B, K)` of the kernels."""

    def __init__(self, channels: int, kernels: int, attention_function: str):
        super().__init__()
        hidden = max(channels // REDUCTION, MIN_HIDDEN)
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, kernels)
        self.softmax = AnnealedSoftmax() if attention_function == SOFTMAX else None
        self.contrast = AnchoredContrast() if attention_function == CAF else None
        he_normal(self)

    def forward(self, pooled: Tensor) -> Tensor:
        scores = self.fc2(torch.relu(self.fc1(pooled)))
        weights: Tensor = (self.softmax or self.contrast)(scores)  # type: ignore[misc]
        return weights


@register("dyconv", budget=True, settings={"attention_function": (SOFTMAX, CAF)})
class DYConv2d(KernelBank):
    """`nn.Conv2d` with n kernels mixed by an annealed softmax; equations above."""

    def __init__(self, *args: Any, attention_function: str = SOFTMAX, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.attention_function = attention_function
        if self.n > 1:
            self.attention = KernelAttention(self.in_channels, self.n, attention_function)
