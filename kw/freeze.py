"""Freezing: a trained model is prepared for evaluation, in place. The same outputs, with less to compute.

1. BatchNorm in an attention is affine once its statistics stand still: it goes into the linear layer before it.
2. At temperature 1 a kernel is its anchor cells alone, whatever the input: the layer becomes a plain, static one.
3. At temperature 0 a mixture is `sum_j z_j cell_j` over one normalizer, and the scores z are affine in the H
   activations of the attention's hidden layer. So the sum folds into H + 1 kernels that are made once: mixing them
   takes `|W| (H + 1)` multiply-adds an image in place of `|W| n`. They take the memory of H + 1 static layers, and
   for one image, reading them is the time. So a layer is folded where n is at least `WORTHWHILE` times H + 1 and
   `LEAST_SAVED` multiply-adds an image are saved, and only as far as a limit on memory allows, the largest savings
   per byte first. Softmax, sigmoid and tanh, which the ablations have, are not linear: there nothing folds.

The third step's rule is by `python -m scripts.benchmark_freeze` (one core of an EPYC that others used too, float32,
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
from torch.nn import functional as F

from kw import functional
from kw.attention import FUNCTIONS, Attention, contrast, size
from kw.layers import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear, drop_unused_warehouses
from kw.profile import table
from kw.replace import convolution_arguments, replace
from kw.ways.grouped import per_sample

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
        elif not _is_linear(layer):
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
        if not _is_linear(layer):
            function = layer.attention.attention_function
            raise ValueError(f"Layer {layer.draw.kernel.name!r}: attention_function={function!r} cannot be folded.")
        self.attention, self.bias = layer.attention, layer.bias
        kernel = layer.draw.kernel
        self.layer_name, self.grid = kernel.name, layer.draw.grid
        self.shape = (kernel.channels_out, kernel.channels_in, kernel.positions)
        self.cell = tuple(layer.warehouse.cells.shape[1:])
        # Being affine, the scores are known from those of the unit vectors and of zero. In double precision, for
        # the weights are differences of these.
        attention = copy.deepcopy(layer.attention).double()
        unit = torch.eye(kernels_to_mix(layer), dtype=torch.float64, device=layer.warehouse.cells.device)[:, :-1]
        scores = attention.scores_of(unit)[..., : attention.cells]
        scores[:-1] -= scores[-1]
        kernels = functional.assemble(scores.to(layer.warehouse.cells.dtype), layer.warehouse.cells, layer.draw.grid)
        self.kernels = nn.Parameter(kernels.flatten(1), requires_grad=False)  # (H + 1, |W|), the last the offset

    def assemble(self, pooled: Tensor) -> Tensor:
        """Pooled input `(B, C_in)` to each sample's kernel `(B, C_out, C_in / groups, P)`."""
        batch = len(pooled)
        hidden = self.attention.hidden(pooled)
        z = self.attention.scores_of(hidden)
        z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z  # as the attention does
        scale = 1 / size(z)  # (B, m, 1)
        kernels = torch.addmm(self.kernels[-1], hidden, self.kernels[:-1])
        (positions, rows, columns), (o, i) = self.grid, self.cell
        scale = scale.view(batch, positions, rows, columns).permute(0, 2, 3, 1).to(kernels.dtype)
        kernels = kernels.view(batch, rows, o, columns, i, positions) * scale[:, :, None, :, None]
        return kernels.view(batch, *self.shape)

    def extra_repr(self) -> str:
        return f"{self.layer_name!r}, mixed from {len(self.kernels)} kernels"


class FoldedLinear(FoldedLayer):
    """`KWLinear` with its assembly folded: on `(B, *, C_in)`."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        kernels = self.assemble(tokens.mean(dim=1)).squeeze(3)
        out = torch.bmm(tokens, kernels.transpose(1, 2)).view(*x.shape[:-1], kernels.shape[1])
        return out if self.bias is None else out + self.bias.to(out.dtype)


class FoldedConv(FoldedLayer):
    """`KWConv1d`, `2d` or `3d` with its assembly folded: on `(B, C_in, *space)`."""

    def __init__(self, layer: KWConv):
        super().__init__(layer)
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.groups, self.padding, self.padding_mode = layer.groups, layer.padding, layer.padding_mode
        self.pad: list[int] | None = None  # what is padded other than by zeros, beforehand
        if layer.padding_mode != "zeros":
            self.pad, self.padding = layer._explicit_padding(), "valid"
        unpadded = isinstance(self.padding, str) or not any(self.padding)  # "same" pads a kernel of one by nothing
        self.pointwise = self.shape[2] == 1 and self.groups == 1 and unpadded

    def forward(self, x: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        if x.dim() != dims + 2:
            raise ValueError(f"Layer {self.layer_name!r} takes a batch, {dims + 2} dimensions, not {tuple(x.shape)}.")
        kernels = self.assemble(x.flatten(2).mean(dim=2))
        out = self._convolve(x if self.pad is None else F.pad(x, self.pad, mode=self.padding_mode), kernels)
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, *(1,) * dims)

    def _convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        if self.pointwise:
            if max(self.stride) > 1:
                x = x[(slice(None), slice(None), *(slice(None, None, step) for step in self.stride))]
            return torch.bmm(kernels.squeeze(3), x.flatten(2)).view(len(x), kernels.shape[1], *x.shape[2:])
        kernels = kernels.view(*kernels.shape[:3], *self.kernel_size)
        return per_sample(x, kernels, self.stride, self.padding, self.dilation, self.groups)


def fold(layer: KWLayer) -> FoldedLayer:
    """The layer with its assembly folded, whether or not that pays."""
    if isinstance(layer, KWLinear):
        return FoldedLinear(layer)
    assert isinstance(layer, KWConv)
    return FoldedConv(layer)


def kernels_to_mix(layer: KWLayer) -> int:
    """H + 1."""
    return layer.attention.fc1.out_features + 1


def _is_linear(layer: KWLayer) -> bool:
    """Whether the attentions are linear in the scores, up to one normalizer per mixture."""
    return FUNCTIONS[layer.attention.attention_function] is contrast


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
        if layer.attention.tau == 0 and _is_linear(layer) and _pays(layer) and taken <= limit:
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
