"""What a model costs: parameters and multiply-adds by layer, and which layers share a warehouse, as a table."""

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
from kw.layers import DynamicLayer, KWLayer, KWLinear
from kw.table import table
from kw.warehouse import Warehouse

STATIC = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
IMAGE = (3, 224, 224)


@dataclass(frozen=True)
class LayerCost:
    """One layer: its own parameters (cells count for the warehouse), and multiply-adds for one image.

    `apply` counts the convolution or matrix product with a kernel of the static layer's size, `attention` the module
    of this name, `assembly` the rest: mixing this image's kernel, or what another method does instead. The last two are
    0 for a static layer.
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
class LayerShare:
    """A layer's share of a warehouse. It mixes all cells, and `owned` ones from `start` on are its own."""

    layer: str
    mixtures: int
    start: int
    owned: int


@dataclass(frozen=True)
class WarehouseCost:
    """A warehouse: the shape `(n, o, i)` of its cells, their parameters, its budget, and its layers in module order."""

    name: str
    cells: tuple[int, ...]
    params: int
    budget: str
    shares: tuple[LayerShare, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(share.layer for share in self.shares)

    @property
    def mixtures(self) -> int:
        return sum(share.mixtures for share in self.shares)


@dataclass(frozen=True)
class Profile:
    """Totals of a model, and its parts. `str(profile)` is a table.

    `macs` counts every convolution and matrix product of one image's forward pass, with the "grouped" implementation.
    `other_macs` are those outside of `layers`, such as products inside softmax attention.
    """

    params: int
    macs: int
    layers: tuple[LayerCost, ...]
    warehouses: tuple[WarehouseCost, ...]

    @property
    def apply(self) -> int:
        return sum(layer.apply for layer in self.layers)

    @property
    def assembly(self) -> int:
        return sum(layer.assembly for layer in self.layers)

    @property
    def attention(self) -> int:
        return sum(layer.attention for layer in self.layers)

    @property
    def other_macs(self) -> int:
        return self.macs - self.apply - self.assembly - self.attention

    @property
    def other_params(self) -> int:
        """Parameters that are neither in `layers` nor cells: norms, embeddings."""
        layers, cells = (sum(part.params for part in parts) for parts in (self.layers, self.warehouses))
        return self.params - layers - cells

    def __str__(self) -> str:
        text = table(LAYER_HEAD, self._layer_rows())
        if self.warehouses:
            text += "\n\n" + table(WAREHOUSE_HEAD, self._warehouse_rows())
        other = f", {self.other_macs:,} of them outside these layers" if self.other_macs else ""
        return f"{text}\n\n{self.params:,} parameters, {self.macs:,} multiply-adds per image{other}"

    def _layer_rows(self) -> list[tuple[object, ...]]:
        """The layers, the rest of the model, and the total."""
        rows: list[tuple[object, ...]] = [
            (c.name, c.kind, c.warehouse or "-", c.mixtures or "-", c.params, c.apply, c.assembly, c.attention, c.macs)
            for c in self.layers
        ]
        cells = sum(warehouse.params for warehouse in self.warehouses)
        mixtures = sum(warehouse.mixtures for warehouse in self.warehouses)
        if cells:
            rows.append(("cells of all warehouses", "-", "-", "-", cells, "-", "-", "-", "-"))
        if self.other_params or self.other_macs:
            other = self.other_macs or "-"
            rows.append(("other", "-", "-", "-", self.other_params, "-", "-", "-", other))
        sums = (self.apply, self.assembly, self.attention, self.macs)
        return [*rows, ("total", "-", "-", mixtures or "-", self.params, *sums)]

    def _warehouse_rows(self) -> list[tuple[object, ...]]:
        """Each warehouse, and below it its layers with their own cells."""
        rows: list[tuple[object, ...]] = []
        for w in self.warehouses:
            n, o, i = w.cells
            rows.append((w.name, w.budget, f"{n} of {o} x {i}", w.mixtures, n, w.params))
            for share in w.shares:
                own = f"{share.start} to {share.start + share.owned - 1}" if share.owned else "none"
                rows.append((f"  {share.layer}", "", own, share.mixtures, share.owned, share.owned * o * i))
        return rows


LAYER_HEAD = ("layer", "kind", "warehouse", "mixtures", "params", "MACs: apply", "assembly", "attention", "all")
WAREHOUSE_HEAD = ("warehouse and its layers", "n", "cells", "mixtures", "cells owned", "params")


@torch.no_grad()
def profile(model: nn.Module, input_size: Sequence[int] | None = None) -> Profile:
    """Profile `model` on one image of zeros, in evaluation mode. The model does not change.

    Args:
        model: vanilla or converted, on any device.
        input_size: `(C, H, W)`; by default the one that timm records for the model, or else 3 x 224 x 224.
    """
    like = next(model.parameters())
    size = tuple(input_size or (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or IMAGE)
    counter = FlopCounterMode(display=False)
    meter = _Meter(counter)
    for module in model.modules():
        if isinstance(module, (*STATIC, DynamicLayer)):
            meter.watch(module)
        if isinstance(module, DynamicLayer) and module.attention is not None:
            meter.watch(module.attention)
    training = {module: module.training for module in model.modules()}
    try:
        # The counter counts matrix products, but not every fused softmax attention.
        with counter, functional.use("grouped"), sdpa_kernel(SDPBackend.MATH):
            model.eval()(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
    finally:
        meter.remove()
        for module, mode in training.items():
            module.training = mode
    return Profile(
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        layers=tuple(_layer_costs(model, meter)),
        warehouses=tuple(_warehouse_cost(module) for module in model.modules() if isinstance(module, Warehouse)),
    )


class _Meter:
    """Multiply-adds of modules, and positions of their outputs, over all their calls in a forward pass."""

    def __init__(self, counter: FlopCounterMode):
        self.counter = counter
        self.macs: dict[nn.Module, int] = {}
        self.positions: dict[nn.Module, int] = {}
        self.hooks: list[Any] = []

    def watch(self, module: nn.Module) -> None:
        self.hooks += [module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, module: nn.Module, inputs: Any) -> None:
        self.macs[module] = self.macs.get(module, 0) - self.counter.get_total_flops() // 2

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.macs[module] += self.counter.get_total_flops() // 2
        if isinstance(output, Tensor):
            channels = output.shape[-1] if isinstance(module, (nn.Linear, KWLinear)) else output.shape[1]
            self.positions[module] = self.positions.get(module, 0) + output.numel() // channels


def _layer_costs(model: nn.Module, meter: _Meter) -> Iterable[LayerCost]:
    inside = {part for module in model.modules() if isinstance(module, DynamicLayer) for part in module.modules()}
    for name, module in model.named_modules():
        if module not in meter.macs or (module in inside and not isinstance(module, DynamicLayer)):
            continue
        own = module.own_parameters() if isinstance(module, KWLayer) else module.parameters()
        params = sum(parameter.numel() for parameter in own)
        kind, macs = type(module).__name__, meter.macs[module]
        if not isinstance(module, DynamicLayer):
            yield LayerCost(name, kind, None, 0, params, macs, 0, 0)
            continue
        warehouse, mixtures = (
            (module.warehouse.name, module.share.mixtures) if isinstance(module, KWLayer) else (None, 0)
        )
        apply = math.prod(module.kernel_shape) * meter.positions[module]
        attention = meter.macs.get(module.attention, 0)
        yield LayerCost(name, kind, warehouse, mixtures, params, apply, macs - apply - attention, attention)


def _warehouse_cost(warehouse: Warehouse) -> WarehouseCost:
    cells = warehouse.cells
    shares = tuple(LayerShare(s.kernel.name, s.mixtures, s.start, s.owned) for s in warehouse.shares)
    return WarehouseCost(warehouse.name, tuple(cells.shape), cells.numel(), str(warehouse.config.n), shares)
