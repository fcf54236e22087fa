"""CondConv (Yang et al., NeurIPS 2019, arXiv 1904.04971): kernels mixed by a sigmoid routing, section 3.1.

    W = sum_k alpha_k W_k,    alpha = sigmoid(R pool(x))

Shapes: x `(B, C_in, H, W)`, alpha `(B, K)`, W_k `(C_out, C_in / groups, kh, kw)`. R is a linear layer with bias. Each
of the K kernels ("experts") is initialized separately, as a static one would be.

Differs from the paper: the scope. The paper makes the last blocks and the classifier conditional; here all methods have
the same layers.

With `attention_function="caf"`, alpha is KernelWarehouse's attention function of R pool(x), with its temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kw.baselines.layer import CAF, AnchoredContrast, KernelBank
from kw.baselines.registry import register

SIGMOID = "sigmoid"


class Routing(nn.Module):
    """Pooled features `(B, C)` to the weights `(B, K)` of the experts, each in (0, 1) unless it is a contrast."""

    def __init__(self, channels: int, kernels: int, attention_function: str):
        super().__init__()
        self.fc = nn.Linear(channels, kernels)
        nn.init.xavier_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.contrast = AnchoredContrast() if attention_function == CAF else None

    def forward(self, pooled: Tensor) -> Tensor:
        scores = self.fc(pooled)
        return torch.sigmoid(scores) if self.contrast is None else self.contrast(scores)


@register("condconv", budget=True, settings={"attention_function": (SIGMOID, CAF)})
class CondConv2d(KernelBank):
    """`nn.Conv2d` with n experts mixed by a sigmoid routing; equations above."""

    def __init__(self, *args: Any, attention_function: str = SIGMOID, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.attention_function = attention_function
        self.attention = Routing(self.in_channels, self.n, attention_function)
