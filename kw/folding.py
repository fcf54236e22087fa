"""Folding: what replaces a dynamic layer, or a part of it, in a model that is only evaluated. All exact.

- `fold_norm`: BatchNorm in an attention is affine in evaluation mode, so it merges into the linear layer before it.
- `static_layer`: at temperature 1 a kernel consists of its anchor cells, whatever the input is; the layer is static.
- `fold`: at temperature 0 a mixture is `sum_j z_j cell_j` over one normalizer, and the scores z are affine in the H
  activations of the attention's hidden layer. So the sum folds into H + 1 kernels, which are made once. Mixing them
  takes `|W| (H + 1)` multiply-adds an image in place of `|W| n`. They take the memory of H + 1 static layers. Softmax,
  sigmoid and tanh, which the ablations use, are not linear and do not fold.

Shapes: `B` batch, `C` channels, `H` hidden width, `m` mixtures, `n` cells, `o` by `i` channels of a cell, `|W|` entries
of a kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kw import functional
from kw.attention import Attention
from kw.compute.mixing import mix
from kw.layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear, OnPositions, OnTokens
from kw.replace import convolution_arguments

KWConv = KWConv1d | KWConv2d | KWConv3d
CONVOLUTIONS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    KWConv1d: nn.Conv1d,
    KWConv2d: nn.Conv2d,
    KWConv3d: nn.Conv3d,
}


class FoldedLayer(nn.Module):
    """A dynamic layer whose kernel is mixed from H + 1 kernels that it stores. Base of convolutions and linear layers.

    Args:
        layer: in evaluation mode, at temperature 0, with an affine attention function. The folded layer takes over its
            attention and its bias.

    Raises:
        ValueError: the attention function is not affine.
    """

    def __init__(self, layer: KWLayer):
        super().__init__()
        if not layer.attention.is_affine:
            function = layer.attention.attention_function
            raise ValueError(f"Layer {layer.layer_name!r}: attention_function={function!r} cannot be folded.")
        self.attention, self.bias = layer.attention, layer.bias
        self.layer_name, self.geometry, self.kernel_shape = layer.layer_name, layer.geometry, layer.kernel_shape
        cells = layer.warehouse.cells
        maps = copy.deepcopy(layer.attention).double().maps()
        self.basis = nn.Parameter(mix(maps, cells.double()).to(cells.dtype), requires_grad=False)  # (H + 1, m, o, i)

    def _compute(self, x: Tensor, pooled: Tensor) -> Tensor:
        """`(B, C_in, *space)` and its mean over space, `(B, C_in)`, to the output `(B, C_out, *out)`."""
        weights = self.attention(pooled, folded=True)
        choice = functional.choose(functional.setting_of(self), x, self.basis, self.geometry, makes=("folded",))
        return functional.compute(x, weights, self.basis, self.geometry, choice.apply, self.bias)

    def extra_repr(self) -> str:
        return f"{self.layer_name!r}, mixed from {len(self.basis)} kernels"


class FoldedLinear(OnTokens, FoldedLayer):
    """`KWLinear` with its assembly folded, on `(B, *, C_in)`."""

    def __init__(self, layer: KWLinear):
        FoldedLayer.__init__(self, layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features


class FoldedConv(OnPositions, FoldedLayer):
    """`KWConv1d`, `2d` or `3d` with its assembly folded, on `(B, C_in, *space)`."""

    def __init__(self, layer: KWConv):
        FoldedLayer.__init__(self, layer)
        self.dims, self.in_channels = layer.dims, layer.in_channels
        self.padding_mode, self.extra_padding = layer.padding_mode, layer.extra_padding


def fold(layer: KWLayer) -> FoldedLayer:
    """The layer with its assembly folded, whether or not that saves time. Raises ValueError as `FoldedLayer` does."""
    if isinstance(layer, KWLinear):
        return FoldedLinear(layer)
    assert isinstance(layer, KWConv)
    return FoldedConv(layer)


def kernels_to_mix(layer: KWLayer) -> int:
    """How many kernels the folded layer mixes: H + 1."""
    return layer.attention.features + 1


def fold_norm(attention: Attention) -> bool:
    """Merge an attention's BatchNorm into `fc1`. False if it has no BatchNorm, or one without running statistics."""
    norm = attention.norm
    if not isinstance(norm, (nn.BatchNorm1d, nn.SyncBatchNorm)) or norm.running_mean is None:
        return False
    attention.fc1 = nn.utils.fuse_linear_bn_eval(attention.fc1, norm)
    attention.add_module("norm", nn.Identity())
    return True


def static_layer(layer: KWLayer) -> nn.Module:
    """The `nn.Linear` or `nn.Conv*d` that computes what an anchored `layer` computes at temperature 1."""
    cells = layer.warehouse.cells
    assert layer.attention.beta is not None, "the layer is anchored"
    weight = functional.assemble(layer.attention.beta[None].to(cells), cells, layer.share.grid).view(layer.kernel_shape)
    static: nn.Module
    with torch.device("meta"):
        if isinstance(layer, KWLinear):
            static = nn.Linear(layer.in_features, layer.out_features, bias=False)
        else:
            assert isinstance(layer, KWConv)
            static = CONVOLUTIONS[type(layer)](*convolution_arguments(layer))
    static.register_parameter("weight", nn.Parameter(weight))
    static.register_parameter("bias", layer.bias)
    return static
