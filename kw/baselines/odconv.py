"""ODConv (Li et al., ICLR 2022, "Omni-dimensional dynamic convolution"): four attentions on n kernels, section 3.2.

    y = a_filter * ((a_space * sum_k a_kernel[k] W_k) conv (a_channel * x)) + b

Shapes: x `(B, C_in, H, W)`, a_kernel `(B, K)`, a_space `(B, P)`, a_channel `(B, C_in)`, a_filter `(B, C_out)`,
W_k `(C_out, C_in / groups, kh, kw)`. All four are computed from `h = relu(norm(fc(pool(x))))`,
`max(C_in / 16, 16)` wide: a_kernel by a softmax with annealed temperature, the others by sigmoids, which all kernels
share. A pointwise kernel has no a_space, a depthwise one no a_filter, and a single kernel no a_kernel. Attentions of
input and output channels scale input and output, which equals scaling kernels and takes fewer products.

Parameters are exactly the published ones. Multiply-adds of `kw.profile` are a few percent fewer than published, because
it counts products and convolutions only, and not elementwise products such as that with a_space (docs/methods.md).

Differs from the paper: the bias is static. As in the paper, only the softmax has a temperature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kw.baselines.layer import MIN_HIDDEN, AnnealedSoftmax, KernelBank, he_normal, pool
from kw.baselines.registry import register
from kw.compute.tracing import leaf

REDUCTION = 16


class Attentions(NamedTuple):
    """The four attentions of a batch; None for those that the layer does not have."""

    channel: Tensor
    filter: Tensor | None
    space: Tensor | None
    kernel: Tensor | None


class OmniAttention(nn.Module):
    """Pooled features `(B, C_in)` to `Attentions`.

    Raises:
        ValueError: one sample in training mode: BatchNorm needs two for its statistics.
    """

    def __init__(self, layer: KernelBank):
        super().__init__()
        hidden = max(layer.in_channels // REDUCTION, MIN_HIDDEN)
        self.fc = nn.Linear(layer.in_channels, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.channel = nn.Linear(hidden, layer.in_channels)
        self.filter = None if layer.is_depthwise else nn.Linear(hidden, layer.out_channels)
        self.space = None if layer.positions == 1 else nn.Linear(hidden, layer.positions)
        self.kernel = None if layer.n == 1 else nn.Sequential(nn.Linear(hidden, layer.n), AnnealedSoftmax())
        he_normal(self)

    def forward(self, pooled: Tensor) -> Attentions:
        if self.norm.training and pooled.shape[0] == 1:
            raise ValueError(
                "BatchNorm in the attention of ODConv cannot train on a batch of one: use at least two samples per "
                "device, or model.eval()."
            )
        h = torch.relu(self.norm(self.fc(pooled)))
        return Attentions(
            channel=torch.sigmoid(self.channel(h)),
            filter=torch.sigmoid(self.filter(h)) if self.filter else None,
            space=torch.sigmoid(self.space(h)) if self.space else None,
            kernel=self.kernel(h) if self.kernel else None,
        )


@register("odconv", budget=True)
class ODConv2d(KernelBank):
    """`nn.Conv2d` with four attentions on n kernels; equations above."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.attention = OmniAttention(self)

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        attentions = self.attention(pool(x))
        out = self.convolve_mixed(x * attentions.channel[..., None, None], attentions.kernel, attentions.space)
        return self.add_bias(out if attentions.filter is None else out * attentions.filter[..., None, None])
