"""What a model costs: parameters and multiply-adds by layer, and who draws from which warehouse, as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kw import functional
from kw.layers import KWLayer, KWLinear
from kw.warehouse import Warehouse

STATIC = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
IMAGE = (3, 224, 224)


@dataclass(frozen=True)
class LayerCost:
    """One layer: its own parameters (cells are the warehouse's), and multiply-adds for one image.

    `apply` is the convolution or matrix product itself, `assembly` the mixing of cells into this image's kernel,
    `attention` the linear layers that score the cells. The last two are 0 for a static layer.
    """

    name: str
    kind: str
    warehouse: str | None
    mixtures: int
    params: int
    apply: int
    assembly: int
    attention: int

    @property
    def macs(self) -> int:
        return self.apply + self.assembly + self.attention


@dataclass(frozen=True)
class WarehouseCost:
    """A warehouse: `(n, o, i)` of its cells, their parameters, its budget, and the layers that draw from it."""

    name: str
    cells: tuple[int, ...]
    params: int
    budget: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """Totals over the whole model, and its parts. `str(profile)` is a table.

    `macs` counts every convolution and matrix product of one image's forward pass, in the plain way of computing;
    what no layer of `layers` has (products inside softmax attention) is `other_macs`.
    """

    params: int
    macs: int
    layers: tuple[LayerCost, ...]
    warehouses: tuple[WarehouseCost, ...]

    @property
    def other_macs(self) -> int:
        return self.macs - sum(layer.macs for layer in self.layers)

    def __str__(self) -> str:
        layers = [
            (c.name, c.kind, c.warehouse or "-", c.mixtures or "-", c.params, c.apply, c.assembly, c.attention)
            for c in self.layers
        ]
        head = ("layer", "kind", "warehouse", "mixtures", "params", "MACs: apply", "assembly", "attention")
        text = table(head, layers)
        if self.warehouses:
            rows = [(w.name, "x".join(map(str, w.cells)), w.params, w.budget, len(w.layers)) for w in self.warehouses]
            text += "\n\n" + table(("warehouse", "cells n x o x i", "params", "n", "layers"), rows)
        other = f", {self.other_macs:,} of them outside these layers" if self.other_macs else ""
        return f"{text}\n\n{self.params:,} parameters, {self.macs:,} multiply-adds per image{other}"


@torch.no_grad()
def profile(model: nn.Module, input_size: Sequence[int] | None = None) -> Profile:
    """Profile `model` on one image of zeros, in evaluation mode; the model is left as it was.

    Args:
        model: vanilla or converted, on any device.
        input_size: `(C, H, W)`; by default the one that timm records for the model, or else 3 x 224 x 224.
    """
    like = next(model.parameters())
    size = tuple(input_size or (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or IMAGE)
    outputs: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(_record_positions(outputs, name))
        for name, module in model.named_modules()
        if isinstance(module, (*STATIC, KWLayer))
    ]
    training = {module: module.training for module in model.modules()}
    try:
        # The counter knows matrix products, not every fused softmax attention.
        with FlopCounterMode(display=False) as counter, functional.use("grouped"), sdpa_kernel(SDPBackend.MATH):
            model.eval()(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return Profile(
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        layers=tuple(_layer_costs(model, outputs)),
        warehouses=tuple(_warehouse_cost(module) for module in model.modules() if isinstance(module, Warehouse)),
    )


def _record_positions(outputs: dict[str, int], name: str) -> Any:
    """A hook that adds up the positions at which a layer's kernel is applied, over all its calls."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        channels = output.shape[-1] if isinstance(module, (nn.Linear, KWLinear)) else output.shape[1]
        outputs[name] = outputs.get(name, 0) + output.numel() // channels

    return hook


def _layer_costs(model: nn.Module, positions: dict[str, int]) -> Iterable[LayerCost]:
    attentions = {name for name, module in model.named_modules() if isinstance(module, KWLayer)}
    for name, module in model.named_modules():
        if name not in positions or name.rpartition(".attention.")[0] in attentions:
            continue
        params = sum(parameter.numel() for parameter in module.parameters())
        if not isinstance(module, KWLayer):
            weight = module.get_parameter("weight").numel()
            yield LayerCost(name, type(module).__name__, None, 0, params, weight * positions[name], 0, 0)
            continue
        draw = module.draw
        weight = math.prod(draw.kernel.shape)
        scoring = [layer for layer in module.attention.modules() if isinstance(layer, nn.Linear)]
        rows = {module.attention.fc3: draw.mixtures}  # fc3 maps each mixture's basis scores
        yield LayerCost(
            name,
            type(module).__name__,
            draw.warehouse.name,
            draw.mixtures,
            params,
            apply=weight * positions[name],
            assembly=weight * len(draw.warehouse.cells),
            attention=sum(layer.weight.numel() * rows.get(layer, 1) for layer in scoring),
        )


def _warehouse_cost(warehouse: Warehouse) -> WarehouseCost:
    cells = warehouse.cells
    layers = tuple(draw.kernel.name for draw in warehouse.draws)
    return WarehouseCost(warehouse.name, tuple(cells.shape), cells.numel(), str(warehouse.config.n), layers)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned, numbers to the right. Plain text: kw stands on torch and timm alone."""
    numbers = [all(isinstance(row[k], int) or row[k] == "-" for row in rows) for k in range(len(head))]
    lines = [head, *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    )
