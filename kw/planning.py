"""The plan of a conversion: which layers share a warehouse, how cells are cut, and what that saves or adds, counted
before anything is changed.

The rule of the default plan, for the layers of one stage and kind:

1. They share one warehouse if attention then takes few enough parameters. Else those with kernels of one shape do; else
   halves of those, in the order of the network; and so on.
2. Cells are the finest that keep attention small: quarters of the common channels, halves, or whole. Finer cells make
   more mixtures, and the method gains with their number.
3. Layers whose attention takes more are small. Below n = 1 they are dynamic if they still save a quarter of what n asks
   for. From n = 1 on, those with the least attention for their weights are, as far as the whole allows. Their cells
   are the coarsest. The others stay static.

"Few enough" are a third of the parameters in cells, and never so many that the whole misses what n asks for: at n = 1,
an eighth of the static weights; above, an eighth of what n adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import nn

from kw.attention import attention_parameters
from kw.config import BudgetLike, KWConfig, cell_sides
from kw.observing import Example
from kw.replace import refuse_converted
from kw.scope import WITHIN, Layer, layers_of
from kw.table import table
from kw.warehouse import cell_size, number_of_cells

MAX_MIXTURES = 128  # in a warehouse, since assembling a kernel reads all its cells; published rows have up to 138
CELLS_SHARE = Fraction(1, 3)  # attention's parameters over those of cells
ADDED_SHARE = Fraction(1, 8)  # attention's parameters over those that n adds, or over static weights at n = 1
MOST_ADDED_SHARE = Fraction(15, 100)  # the same, where otherwise no layer would be dynamic
LEAST_SAVED = Fraction(1, 4)  # of what n < 1 asks for
QUARTER, HALF, WHOLE = Fraction(1, 4), Fraction(1, 2), Fraction(1)
CUTS = ((QUARTER, QUARTER), (HALF, QUARTER), (HALF, HALF), (WHOLE, HALF), (WHOLE, WHOLE))  # (out, in), finest first


@dataclass(frozen=True)
class PlannedWarehouse:
    """A warehouse to be: its layers in module order, its settings, and its parameters.

    Args:
        cells: `(n, o, i)`.
        mixtures: of each layer.
        kernels: parameters of the static kernels that it replaces.
        attention: parameters of its layers' attentions.
    """

    name: str
    layers: tuple[str, ...]
    config: KWConfig
    cells: tuple[int, int, int]
    mixtures: tuple[int, ...]
    kernels: int
    attention: int

    @property
    def params(self) -> int:
        return math.prod(self.cells) + self.attention


@dataclass(frozen=True)
class Plan:
    """What `kw.convert` would do to a model. `str(plan)` is a table with the reason for each layer that stays static.

    Args:
        model: the class of the model, for messages.
        n: the budget that was asked for.
        static_params: all parameters of the static model.
        layers: all convolutions and linear layers of the model.
        warehouses: in the order in which layers first use them.
        static: layer name -> why it stays static.
    """

    model: str
    n: Fraction
    static_params: int
    layers: tuple[Layer, ...]
    warehouses: tuple[PlannedWarehouse, ...]
    static: Mapping[str, str]

    @property
    def params(self) -> int:
        """Parameters of the converted model."""
        return self.static_params + sum(w.params - w.kernels for w in self.warehouses)

    @property
    def scope(self) -> dict[str, str]:
        """Layer name -> warehouse name; a scope for `kw.convert`."""
        return {layer: warehouse.name for warehouse in self.warehouses for layer in warehouse.layers}

    @property
    def configs(self) -> dict[str, KWConfig]:
        """Warehouse name -> its settings."""
        return {warehouse.name: warehouse.config for warehouse in self.warehouses}

    @property
    def gains_little(self) -> bool:
        """Whether less than half of what n asks for is reached: parameters saved (n < 1), layers made dynamic, by their
        weights (n = 1), or a third of the parameters added (n > 1). n asks it of all plain layers but the first and
        the last, gates included."""
        possible = sum(layer.weights for layer in self.layers if layer.static is None or layer.static in WITHIN)
        if self.n < 1:
            return self.static_params - self.params < (1 - self.n) * possible / 2
        if self.n == 1:
            return sum(warehouse.kernels for warehouse in self.warehouses) < Fraction(possible, 2)
        return self.params - self.static_params < (self.n - 1) * possible / 3

    def summary(self) -> str:
        """One line: `n = 1/2: 5,300,000 parameters of 5,900,000, 31 of 48 layers static`."""
        return (
            f"n = {self.n}: {self.params:,} parameters of {self.static_params:,} static ones, "
            f"{len(self.static)} of {len(self.layers)} layers static"
        )

    def __str__(self) -> str:
        by_name = {layer.name: layer for layer in self.layers}
        rows: list[tuple[object, ...]] = []
        for w in self.warehouses:
            n, o, i = w.cells
            cut = f"{n} of {o} x {i}"
            rows.append((w.name, w.config.n, cut, sum(w.mixtures), w.kernels, math.prod(w.cells), w.attention))
            for name, mixtures in zip(w.layers, w.mixtures, strict=True):
                rows.append((f"  {name}", "", _size(by_name[name].shape), mixtures, by_name[name].weights, "", ""))
        head = ("warehouse and its layers", "n", "cells, kernel", "mixtures", "static params", "cells", "attention")
        text = table(head, rows)
        if self.static:
            still = [
                (name, _size(by_name[name].shape), by_name[name].weights, why) for name, why in self.static.items()
            ]
            text += "\n\n" + table(("static layer", "kernel", "params", "why"), still)
        return f"{text}\n\n{self.summary()}"


def plan(
    model: nn.Module,
    n: BudgetLike | KWConfig | None = None,
    *,
    config: KWConfig | None = None,
    example: Example = None,
) -> Plan:
    """Plan the conversion of `model`, which does not change: `kw.convert(model, plan)` carries it out.

    Args:
        model: any static model, on any device.
        n: the budget, such as "1/2" or 4, or a `KWConfig`. By default that of `config`, or 1.
        config: further settings, with this n in place of theirs. `cell_in` and `cell_out` are chosen by the rule,
            unless they differ from those that `KWConfig` has by default.
        example: an input of the model, a tensor or a tuple of arguments with at least two samples, for models whose
            input cannot be guessed: one forward pass shows which layers run, and where (`kw.observing`).

    Raises:
        ValueError: n is not a budget, or the model has dynamic layers already or does not run on `example`.

    Warns:
        UserWarning: no forward pass came to its end, so that names decide.
    """
    if isinstance(n, KWConfig) and config is not None:
        raise ValueError("Pass one KWConfig: n and config are two.")
    refuse_converted(model)
    if isinstance(n, KWConfig):
        settings = n
    else:
        settings = config or KWConfig()
        settings = settings if n is None else _with_budget(settings, n)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{name!r} has no shape yet (a lazy module): run the model once on an input, then convert."
            )
    params = sum(parameter.numel() for parameter in model.parameters())
    return plan_layers(layers_of(model, example), settings, type(model).__name__, params)


def plan_layers(layers: list[Layer], settings: KWConfig, name: str, params: int) -> Plan:
    """The plan for a static model of these layers (`kw.scope.layers_of`), of this name and so many parameters."""
    warehouses: list[PlannedWarehouse] = []
    small: dict[str, list[Layer]] = {}  # base name of warehouses -> layers
    for base, together in _alike(layers, settings).items():
        for group, found in _divide(together, settings, _allowed(settings.n)):
            if found is None:
                small.setdefault(base, []).extend(group)
            else:
                warehouses.append(replace(found, name=base))
    warehouses += _of_small(small, warehouses, settings, layers)
    dynamic = {layer for warehouse in warehouses for layer in warehouse.layers}
    static = {layer.name: layer.static or _too_small(layer, settings) for layer in layers if layer.name not in dynamic}
    order = {layer.name: index for index, layer in enumerate(layers)}
    warehouses.sort(key=lambda warehouse: order[warehouse.layers[0]])
    return Plan(name, settings.n, params, tuple(layers), tuple(_numbered(warehouses)), static)


def _with_budget(config: KWConfig, n: BudgetLike) -> KWConfig:
    """`config` at another n; cells' sides follow from n again, unless they were chosen."""
    chosen = (config.cell_in, config.cell_out) != cell_sides(config.n) and config.partition != "none"
    return config.replace(n=n) if chosen else config.replace(n=n, cell_in=None, cell_out=None)


def _too_small(layer: Layer, config: KWConfig) -> str:
    """Why a layer that could be dynamic is not."""
    attentions = [warehouse.attention for cut in _cuts([layer], config) if (warehouse := _warehouse([layer], cut))]
    return f"attention too large: at least {min(attentions):,} parameters, for a kernel of {layer.weights:,}"


def _alike(layers: list[Layer], config: KWConfig) -> dict[str, list[Layer]]:
    """Base name of warehouses -> layers that might share one, by `sharing` and `partition`."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.static is not None:
            continue
        size = _size(layer.shape[2:])
        name = f"all_{layer.kind}" if config.sharing == "model" else f"stage{layer.stage}_{layer.kind}"
        if config.partition == "none":
            name += "_" + _size(layer.shape)
        elif size and (config.sharing in ("kind", "model") or config.partition == "channel"):
            name += size
        if not layer.trained:
            name += "_frozen"
        found.setdefault(name, []).append(layer)
    return found


def _numbered(warehouses: list[PlannedWarehouse]) -> Iterator[PlannedWarehouse]:
    """The second of a name is called `name_2`, and so on."""
    met: dict[str, int] = {}
    for warehouse in warehouses:
        number = met[warehouse.name] = met.get(warehouse.name, 0) + 1
        yield warehouse if number == 1 else replace(warehouse, name=f"{warehouse.name}_{number}")


def _of_small(
    small: dict[str, list[Layer]], warehouses: list[PlannedWarehouse], config: KWConfig, layers: list[Layer]
) -> list[PlannedWarehouse]:
    """Rule 3: warehouses with the coarsest cells, of layers that are too small by themselves."""
    n = config.n
    allowed = n * CELLS_SHARE if n >= 1 else (1 - n) * (1 - LEAST_SAVED)
    possible = [
        replace(found, name=base)
        for base, together in small.items()
        for _, found in _divide(together, config, allowed, finest=False)
        if found is not None
    ]
    if n < 1:
        return possible
    weights = sum(layer.weights for layer in layers if layer.static is None)
    share = _allowed(n) if warehouses else _allowed(n) / ADDED_SHARE * MOST_ADDED_SHARE
    left = share * weights - sum(warehouse.attention for warehouse in warehouses)
    chosen = []
    for warehouse in sorted(possible, key=lambda warehouse: Fraction(warehouse.attention, warehouse.kernels)):
        if warehouse.attention <= left:
            chosen.append(warehouse)
            left -= warehouse.attention
    return chosen


def _divide(
    group: list[Layer], config: KWConfig, allowed: Fraction, finest: bool = True
) -> Iterator[tuple[list[Layer], PlannedWarehouse | None]]:
    """Rule 1: the largest parts of `group` that can share a warehouse, each with it; None for a layer too small.

    Args:
        allowed: parameters of attention over those of static kernels.
    """
    found = _cut(group, config, allowed, finest) if config.sharing != "none" or len(group) == 1 else None
    if found is not None or len(group) == 1:
        yield group, found
        return
    shapes: dict[tuple[int, ...], list[Layer]] = {}
    for layer in group:
        shapes.setdefault(layer.shape, []).append(layer)
    middle = len(group) // 2
    for part in shapes.values() if len(shapes) > 1 else (group[:middle], group[middle:]):
        yield from _divide(part, config, allowed, finest)


def _cut(group: list[Layer], config: KWConfig, allowed: Fraction, finest: bool) -> PlannedWarehouse | None:
    """Rules 2 and 3: the warehouse with the finest cells that keep attention small, or the coarsest; None if there is
    none."""
    kernels = sum(layer.weights for layer in group)
    cuts = list(_cuts(group, config))
    for cut in cuts if finest else reversed(cuts):
        warehouse = _warehouse(group, cut)
        if warehouse is None:
            continue
        over = max(Fraction(0), math.prod(warehouse.cells) - config.n * kernels)  # cells by rounding up
        if warehouse.attention + over <= allowed * kernels:
            return warehouse
    return None


def _allowed(n: Fraction) -> Fraction:
    """Parameters of attention over those of the static kernels."""
    if n < 1:
        return n * CELLS_SHARE
    return min(n * CELLS_SHARE, (n - 1) * ADDED_SHARE) if n > 1 else ADDED_SHARE


def _cuts(group: list[Layer], config: KWConfig) -> Iterator[KWConfig]:
    """`config` with each size of cells for these layers, finest first."""
    gcd = [math.gcd(*(layer.shape[side] for layer in group)) for side in (0, 1)]
    if config.partition == "none" or (config.cell_in, config.cell_out) != cell_sides(config.n):
        sides = [
            _dividing(channels, side) for channels, side in zip(gcd, (config.cell_out, config.cell_in), strict=True)
        ]
        yield config.replace(cell_out=sides[0], cell_in=sides[1])
        return
    for out, into in CUTS:
        if (gcd[0] * out).denominator == 1 and (gcd[1] * into).denominator == 1:
            yield config.replace(cell_out=out, cell_in=into)


def _dividing(channels: int, fraction: Fraction) -> Fraction:
    """The largest fraction of `channels`, up to `fraction`, that is a divisor of them."""
    side = max(int(channels * fraction), 1)
    return Fraction(next(divisor for divisor in range(side, 0, -1) if channels % divisor == 0), channels)


def _warehouse(group: list[Layer], config: KWConfig) -> PlannedWarehouse | None:
    """The warehouse of these layers, counted; None if it had too many mixtures."""
    o, i, span = cell_size([layer.shape for layer in group], config)
    mixtures = tuple(layer.weights // (o * i * span) for layer in group)
    if sum(mixtures) > MAX_MIXTURES and len(group) > 1:
        return None
    n = number_of_cells(mixtures, config)
    attention = sum(
        attention_parameters(layer.channels, m, n, config) for layer, m in zip(group, mixtures, strict=True)
    )
    names = tuple(layer.name for layer in group)
    kernels = sum(layer.weights for layer in group)
    return PlannedWarehouse("", names, config, (n, o, i * span), mixtures, kernels, attention)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
