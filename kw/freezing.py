"""Freezing: prepare a trained model for evaluation, in place. The outputs stay the same, with less to compute.

Each dynamic layer becomes static, or is folded, or only has its attention's BatchNorm merged (kw/folding.py). Folded
kernels take memory, and for one image, reading them takes most of the time. So a layer is folded only where `n` is at
least `WORTHWHILE` times `H + 1` and `LEAST_SAVED` multiply-adds an image are saved, and only as far as a limit on
memory allows, starting with the largest savings per byte. `python -m scripts.bench.freeze` measures the rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from kw.attention import Attention
from kw.compute.narrow import NARROW
from kw.folding import FoldedLayer, fold, fold_norm, kernels_to_mix, static_layer
from kw.frozen import mark_frozen, refuse_frozen
from kw.layers import KWLayer
from kw.low_precision import NarrowCells, narrow
from kw.norms import merge_norms
from kw.replace import carry_hooks, drop_unused_warehouses, replace
from kw.table import table

WORTHWHILE = 4  # cells per folded kernel
LEAST_SAVED = 1_000_000  # multiply-adds an image; the fixed costs of a call outweigh less
FOLDED = "BatchNorm folded"


@dataclass(frozen=True)
class FrozenLayer:
    """What freezing did to one layer, and the multiply-adds of its assembly for one image, before and after."""

    name: str
    kind: str
    norm: str
    kernel: str
    assembly_before: int
    assembly: int


@dataclass(frozen=True)
class Report:
    """What `freeze` did to each layer, and the bytes of the model's parameters and buffers. `str(report)` is a table.

    `norms`, `static` and `folded` count attentions without their BatchNorm, layers made static, layers folded;
    `merged` the model's other BatchNorms that are part of the layer before them now.
    """

    layers: tuple[FrozenLayer, ...]
    bytes_before: int
    bytes: int
    norms: int
    static: int
    folded: int
    merged: int = 0

    def __str__(self) -> str:
        rows = [(r.name, r.kind, r.norm, r.kernel, r.assembly_before, r.assembly) for r in self.layers]
        before, after = (sum(getattr(row, key) for row in self.layers) for key in ("assembly_before", "assembly"))
        return (
            f"{table(('layer', 'kind', 'norm of attention', 'kernel', 'MACs: assembly', 'now'), rows)}\n\n"
            f"{len(self.layers)} dynamic layers: {self.norms} norms folded, {self.static} made static, "
            f"{self.folded} assemblies folded; {self.merged} norms of the model merged into layers\n"
            f"assembly {before:,} -> {after:,} multiply-adds per image; "
            f"{self.bytes_before / 1e6:,.1f} -> {self.bytes / 1e6:,.1f} MB"
        )


@torch.no_grad()
def freeze(model: nn.Module, memory: float = 1.0, dtype: torch.dtype | None = None, norms: bool = True) -> Report:
    """Prepare a trained model for evaluation, in place. It cannot be trained afterwards, nor frozen again. Hooks on
    layers stay.

    Args:
        model: with dynamic layers, its weights loaded and its temperature final. It is set to evaluation mode.
        memory: how many bytes folded kernels may take, as a multiple of the model's bytes before; 0 folds none.
        dtype: `torch.bfloat16` or `torch.int8`: keep the cells in that type, rounded (kw/low_precision.py), so that one
            image takes less time. This alone changes the outputs, a little. No layer is folded then.
        norms: merge BatchNorms that follow a layer into it, where that is exact (kw/norms.py).

    Raises:
        ValueError: the model has no dynamic layer, is one itself, or is frozen already; memory is below 0; or there is
            no such dtype for cells.
    """
    if dtype not in (None, *NARROW):
        raise ValueError(f"dtype={dtype} is not for cells; there are {', '.join(map(str, NARROW))}, or None.")
    if not memory >= 0:
        raise ValueError(f"memory={memory!r} must be at least 0, the multiple of the model's bytes that may be added.")
    refuse_frozen(model, "cannot be frozen again")
    layers = {module: name for name, module in model.named_modules() if isinstance(module, KWLayer)}
    if not layers:
        raise ValueError(
            f"This {type(model).__name__} has no dynamic layer with a warehouse to freeze; kw.convert it first."
        )
    if model in layers:
        raise ValueError(f"The model itself is a {type(model).__name__}: freeze nn.Sequential(model).")
    model.eval()
    bytes_before = _bytes(model)
    folding = _worth_folding(layers, memory * bytes_before) if dtype is None else set()
    frozen: dict[nn.Module, nn.Module] = {}
    rows = []
    for layer, name in layers.items():
        tau = layer.attention.tau
        norm = _fold_norm(layer.attention) if tau != 1 else "removed with the attention"
        n, mixed = len(layer.warehouse.cells), kernels_to_mix(layer)
        if tau == 1:
            frozen[layer] = static_layer(layer)
            kernel, mixed = "static", 0
        elif layer in folding:
            frozen[layer] = fold(layer)
            kernel = f"mixed from {mixed} kernels in place of {n} cells"
        elif tau:
            kernel, mixed = f"assembled: folds at temperature 0 only, not {tau:g}", n
        elif not layer.attention.is_affine:
            kernel, mixed = f"assembled: {layer.attention.attention_function} does not fold", n
        else:
            reason = "over the limit on memory" if _pays(layer) else "little to save"
            kernel, mixed = f"assembled: {reason} ({mixed} for {n} cells)", n
        weight = math.prod(layer.kernel_shape)
        rows.append(FrozenLayer(name, type(layer).__name__, norm, kernel, weight * n, weight * mixed))
    for layer, name in layers.items():
        if layer in frozen:
            carry_hooks(layer, frozen[layer].eval(), name)
    replace(model, frozen)
    merged = merge_norms(model) if norms else 0
    if dtype is not None:
        _narrow(model, frozen, dtype)
    drop_unused_warehouses(model)
    for module in (model, *(frozen.get(layer, layer) for layer in layers)):
        mark_frozen(module)
    return Report(
        layers=tuple(rows),
        bytes_before=bytes_before,
        bytes=_bytes(model),
        norms=sum(row.norm == FOLDED for row in rows),
        static=sum(row.kernel == "static" for row in rows),
        folded=sum(isinstance(module, FoldedLayer) for module in frozen.values()),
        merged=merged,
    )


def _narrow(model: nn.Module, frozen: dict[nn.Module, nn.Module], dtype: torch.dtype) -> None:
    """Replace the layers that still have a warehouse by ones with narrow cells, and note them in `frozen`."""
    cells: dict[nn.Module, NarrowCells] = {}
    layers: dict[nn.Module, nn.Module] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, KWLayer):
            if layer.warehouse not in cells:
                cells[layer.warehouse] = NarrowCells(layer.warehouse, dtype)
            layers[layer] = narrow(layer, cells[layer.warehouse]).eval()
            carry_hooks(layer, layers[layer], name)
    replace(model, layers)
    frozen.update(layers)


def _pays(layer: KWLayer) -> bool:
    """Whether folding the layer's assembly saves time, apart from the memory that it takes."""
    n, mixed, weight = len(layer.warehouse.cells), kernels_to_mix(layer), math.prod(layer.kernel_shape)
    return n >= WORTHWHILE * mixed and weight * (n - mixed) >= LEAST_SAVED


def _worth_folding(layers: Iterable[KWLayer], limit: float) -> set[KWLayer]:
    """The layers to fold: each saves much, and together their kernels stay below `limit` bytes."""
    chosen = set()
    for layer in sorted(layers, key=lambda layer: kernels_to_mix(layer) / len(layer.warehouse.cells)):
        size = math.prod(layer.kernel_shape) * kernels_to_mix(layer) * layer.warehouse.cells.element_size()
        if layer.attention.tau == 0 and layer.attention.is_affine and _pays(layer) and size <= limit:
            chosen.add(layer)
            limit -= size
    return chosen


def _fold_norm(attention: Attention) -> str:
    """Fold the attention's BatchNorm if it has one. Returns what was done, for the report."""
    kind = type(attention.norm).__name__
    return FOLDED if fold_norm(attention) else f"{kind} stays: it has no running statistics"


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
