"""Freezing: a trained model is prepared for evaluation, in place. The same outputs, with less to compute.

1. BatchNorm in an attention is affine once its statistics stand still: it goes into the linear layer before it.
2. At temperature 1 a kernel is its anchor cells alone, whatever the input: the layer becomes a plain, static one.
3. At temperature 0 a mixture is `sum_j z_j cell_j` over one normalizer, and the scores z are affine in the H
   activations of the attention's hidden layer. So the sum folds into H + 1 kernels that are made once: mixing them
   takes `|W| (H + 1)` multiply-adds an image in place of `|W| n`. They take the memory of H + 1 static layers, and
   for one image, reading them is the time. So a layer is folded where n is at least `WORTHWHILE` times H + 1 and
   `LEAST_SAVED` multiply-adds an image are saved, and only as far as a limit on memory allows, the largest savings
   per byte first. Softmax, sigmoid and tanh, which the ablations have, are not linear: there nothing folds.

The third step's rule is by `python -m scripts.bench.freeze` (one core of an EPYC that others used too, float32,
224 pixels, medians of calls in turns). Layers, batch 1 / 8: from n / (H + 1) = 5 on 1.0 to 12.6 / 1.1 to 4.5 times as
fast, the more the larger the kernel; below 4 from 0.1 to 2.2 times, at up to 1.8 GB a layer. Whole models at the
default limit: ResNet50 at n = 4 1.50 / 1.38 times as fast (409 -> 817 MB) and at n = 1 1.06 / 1.05 (113 -> 225 MB),
ResNet18 at n = 4 1.17 / 1.13 (184 -> 325 MB); ConvNeXt-Tiny at n = 1 and MobileNetV2 at n = 4 0.99 to 1.04, which is
noise. The first step alone is within the noise too (0.94 to 1.08): it saves one small operation a layer.

Shapes: `B` batch, `C` channels, `H` hidden width, `m` mixtures, `n` cells, `o` by `i` channels of a cell, `P` kernel
positions, `|W|` entries of a kernel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kw import functional
from kw.attention import Attention
from kw.compute.mixing import mix
from kw.layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear, OnPositions, OnTokens, drop_unused_warehouses
from kw.profiling import table
from kw.replace import convolution_arguments, replace

WORTHWHILE = 4  # cells per folded kernel
LEAST_SAVED = 1_000_000  # multiply-adds an image, about 0.05 ms: less is lost in what every call costs
FOLDED = "BatchNorm folded"

KWConv = KWConv1d | KWConv2d | KWConv3d
CONVOLUTIONS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    KWConv1d: nn.Conv1d,
    KWConv2d: nn.Conv2d,
    KWConv3d: nn.Conv3d,
}


@dataclass(frozen=True)
class FrozenLayer:
    """What became of one layer, in words, and the multiply-adds of its assembly for one image, before and after."""

    name: str
    kind: str
    norm: str
    kernel: str
    assembly_before: int
    assembly: int


@dataclass(frozen=True)
class Report:
    """What `freeze` did, layer by layer, and the bytes of the model's parameters and buffers. `str(report)` is a table.

    `norms`, `static` and `folded` count attentions without their BatchNorm, layers made static, layers folded.
    """

    layers: tuple[FrozenLayer, ...]
    bytes_before: int
    bytes: int
    norms: int
    static: int
    folded: int

    def __str__(self) -> str:
        rows = [(r.name, r.kind, r.norm, r.kernel, r.assembly_before, r.assembly) for r in self.layers]
        before, after = (sum(getattr(row, key) for row in self.layers) for key in ("assembly_before", "assembly"))
        return (
            f"{table(('layer', 'kind', 'norm of attention', 'kernel', 'MACs: assembly', 'now'), rows)}\n\n"
            f"{len(self.layers)} dynamic layers: {self.norms} norms folded, {self.static} made static, "
            f"{self.folded} assemblies folded\n"
            f"assembly {before:,} -> {after:,} multiply-adds per image; "
            f"{self.bytes_before / 1e6:,.1f} -> {self.bytes / 1e6:,.1f} MB"
        )


@torch.no_grad()
def freeze(model: nn.Module, memory: float = 1.0) -> Report:
    """Prepare a trained model for evaluation, in place; it can then not be trained. The module's head says how.

    Args:
        model: with dynamic layers, its weights loaded and its temperature as it will be. Set to evaluation mode.
        memory: how much folded kernels may take, as a multiple of the bytes that the model has now; 0 folds none.

    Raises:
        ValueError: the model has no dynamic layer, is one itself, or is frozen already; or memory is below 0.
    """
    if not memory >= 0:
        raise ValueError(f"memory={memory!r} must be at least 0, the multiple of the model's bytes that may be added.")
    refuse_frozen(model, "cannot be frozen again")
    layers = {module: name for name, module in model.named_modules() if isinstance(module, KWLayer)}
    if not layers:
        raise ValueError(
            f"This {type(model).__name__} has no dynamic layer with a warehouse to freeze; kw.convert it first."
        )
    if model in layers:
        raise ValueError(f"The model is itself a {type(model).__name__}: freeze nn.Sequential(model).")
    model.eval()
    bytes_before = _bytes(model)
    folding = _worth_folding(layers, memory * bytes_before)
    frozen: dict[nn.Module, nn.Module] = {}
    rows = []
    for layer, name in layers.items():
        tau = layer.attention.tau
        norm = _fold_norm(layer.attention) if tau != 1 else "gone with the attention"
        n, mixed = len(layer.warehouse.cells), kernels_to_mix(layer)
        if tau == 1:
            frozen[layer] = _static(layer)
            kernel, mixed = "static", 0
        elif layer in folding:
            frozen[layer] = fold(layer)
            kernel = f"mixed from {mixed} in place of {n} cells"
        elif tau:
            kernel, mixed = f"assembled: folded at temperature 0 only, not {tau:g}", n
        elif not layer.attention.is_affine:
            kernel, mixed = f"assembled: {layer.attention.attention_function} does not fold", n
        else:
            reason = "over the limit on memory" if _pays(layer) else "little to save"
            kernel, mixed = f"assembled: {reason} ({mixed} for {n} cells)", n
        weight = math.prod(layer.draw.kernel.shape)
        rows.append(FrozenLayer(name, type(layer).__name__, norm, kernel, weight * n, weight * mixed))
    replace(model, {layer: module.eval() for layer, module in frozen.items()})
    drop_unused_warehouses(model)
    for module in (model, *(frozen.get(layer, layer) for layer in layers)):
        module.register_forward_pre_hook(_refuse_training)
    return Report(
        layers=tuple(rows),
        bytes_before=bytes_before,
        bytes=_bytes(model),
        norms=sum(row.norm == FOLDED for row in rows),
        static=sum(row.kernel == "static" for row in rows),
        folded=sum(isinstance(module, FoldedLayer) for module in frozen.values()),
    )


def refuse_frozen(model: nn.Module, what: str) -> None:
    """Raises ValueError if `model` or a part of it is frozen: it "`what`"."""
    for module in model.modules():
        if _refuse_training in module._forward_pre_hooks.values():
            raise ValueError(
                f"This {type(model).__name__} is frozen and {what}: kw.freeze changes a model for good. "
                f"Keep the original, and freeze a copy: kw.freeze(copy.deepcopy(model))."
            )


def _refuse_training(module: nn.Module, args: Any) -> None:
    """A hook before a frozen module's forward pass. It also marks the module as frozen."""
    if module.training:
        raise RuntimeError(
            f"This {type(module).__name__} was frozen for evaluation and cannot run in training mode: call "
            f"model.eval(). To train on, keep the original, and freeze a copy: kw.freeze(copy.deepcopy(model))."
        )


class FoldedLayer(nn.Module):
    """A dynamic layer whose kernel is mixed from H + 1 kernels of its own. What convolutions and linear layers share.

    Args:
        layer: in evaluation mode, at temperature 0, of a contrasting attention function; its attention and bias are
            taken over.

    Raises:
        ValueError: the attention function is another.
    """

    def __init__(self, layer: KWLayer):
        super().__init__()
        if not layer.attention.is_affine:
            function = layer.attention.attention_function
            raise ValueError(f"Layer {layer.layer_name!r}: attention_function={function!r} cannot be folded.")
        self.attention, self.bias = layer.attention, layer.bias
        self.layer_name, self.geometry = layer.layer_name, layer.geometry
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
    """`KWLinear` with its assembly folded: on `(B, *, C_in)`."""

    def __init__(self, layer: KWLinear):
        FoldedLayer.__init__(self, layer)
        self.out_features = layer.out_features


class FoldedConv(OnPositions, FoldedLayer):
    """`KWConv1d`, `2d` or `3d` with its assembly folded: on `(B, C_in, *space)`."""

    def __init__(self, layer: KWConv):
        FoldedLayer.__init__(self, layer)
        self.dims, self.in_channels = layer.dims, layer.in_channels
        self.padding_mode, self.beforehand = layer.padding_mode, layer.beforehand


def fold(layer: KWLayer) -> FoldedLayer:
    """The layer with its assembly folded, whether or not that pays."""
    if isinstance(layer, KWLinear):
        return FoldedLinear(layer)
    assert isinstance(layer, KWConv)
    return FoldedConv(layer)


def kernels_to_mix(layer: KWLayer) -> int:
    """H + 1."""
    return layer.attention.features + 1


def _pays(layer: KWLayer) -> bool:
    """Whether to fold the layer's assembly saves time, memory apart."""
    n, mixed, weight = len(layer.warehouse.cells), kernels_to_mix(layer), math.prod(layer.draw.kernel.shape)
    return n >= WORTHWHILE * mixed and weight * (n - mixed) >= LEAST_SAVED


def _worth_folding(layers: Iterable[KWLayer], limit: float) -> set[KWLayer]:
    """Which layers to fold: much is to be saved, and together they stay below `limit` bytes."""
    chosen = set()
    for layer in sorted(layers, key=lambda layer: kernels_to_mix(layer) / len(layer.warehouse.cells)):
        weight = math.prod(layer.draw.kernel.shape)
        taken = weight * kernels_to_mix(layer) * layer.warehouse.cells.element_size()
        if layer.attention.tau == 0 and layer.attention.is_affine and _pays(layer) and taken <= limit:
            chosen.add(layer)
            limit -= taken
    return chosen


def _fold_norm(attention: Attention) -> str:
    """Fold an attention's BatchNorm into `fc1`, where it has one with statistics. What was done, in words."""
    norm = attention.norm
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return f"{type(norm).__name__} stays: it depends on the input"
    if norm.running_mean is None:
        return f"{type(norm).__name__} stays: it has no running statistics"
    attention.fc1 = nn.utils.fuse_linear_bn_eval(attention.fc1, norm)
    attention.add_module("norm", nn.Identity())
    return FOLDED


def _static(layer: KWLayer) -> nn.Module:
    """The plain layer that computes what `layer` computes at temperature 1."""
    cells = layer.warehouse.cells
    assert layer.attention.beta is not None, "the temperature counts"
    weight = functional.assemble(layer.attention.beta[None], cells, layer.draw.grid).view(layer.draw.kernel.shape)
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


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
