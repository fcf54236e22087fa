"""The warehouse: one tensor of kernel cells, and who draws from it (paper, sections 3.1 and 3.3).

Shapes: `n` cells in the warehouse, `o` by `i` channels of a cell, `m` mixtures in a layer,
`P` spatial positions of its kernel.

A cell is at one position. In two of the paper's ablations (`KWConfig.partition`) it spans all of them: then `i` counts
the numbers of a cell for one output channel, input channels times positions, and `P` is 1 wherever kernels are cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from kw.anchoring import Anchors, all_to_one, by_lot, one_to_one, shares
from kw.compute.gathering import AVAILABLE, forget_failed, gathered
from kw.config import KWConfig

# Of a warehouse for one image, mixtures times cells: each takes at least 16 weights, here 134 million.
MAX_SCORES = 1 << 23

NOTHING = (None, torch.empty(0))


@dataclass(frozen=True)
class KernelShape:
    """A layer's kernel: `name` for messages, `(C_out, C_in / groups, *kernel_size)` as in `nn.Conv2d.weight`."""

    name: str
    shape: tuple[int, ...]

    @property
    def channels_out(self) -> int:
        return self.shape[0]

    @property
    def channels_in(self) -> int:
        return self.shape[1]

    @property
    def positions(self) -> int:
        return math.prod(self.shape[2:])


@dataclass(frozen=True)
class Draw:
    """One layer's share in a warehouse.

    `grid` is `(P, C_out / o, C_in / i)`: the kernel's cells in the order of its mixtures, the last fastest.
    `anchors` holds, per mixture, the cell it equals at temperature 1; `n` stands for the zero cell. None: not anchored.
    Cells `start` to `start + owned` are the layer's own.
    """

    warehouse: Warehouse
    kernel: KernelShape
    grid: tuple[int, int, int]
    anchors: tuple[int, ...] | None
    start: int
    owned: int

    @property
    def mixtures(self) -> int:
        return math.prod(self.grid)


class Warehouse(nn.Module):
    """Kernel cells `(n, o, i)` shared by the layers whose kernels are listed, in the network's module order.

    >>> warehouse = Warehouse([KernelShape("conv", (64, 32, 3, 3))], KWConfig(n="1/2"))
    >>> layer = KWConv2d(32, 64, 3, padding=1, draw=warehouse.draws[0])

    Layers refer to their warehouse without owning it: register it once, on the model (`kw.convert` does).

    Raises:
        ValueError: the kernels cannot be cut into cells of one size, not every cell can be given out once, or cells are
            so many that the attentions would have billions of weights.
    """

    def __init__(self, kernels: Sequence[KernelShape], config: KWConfig, *, name: str = "warehouse"):
        super().__init__()
        self.name = name
        self.config = config
        if not kernels:
            raise ValueError(f"Warehouse {name!r} has no layer to draw from it: list at least one kernel.")
        self._check_alike(kernels)
        self.span = 1 if config.partition == "spatial_channel" else kernels[0].positions  # of a cell, in positions
        o = _cell_side([kernel.channels_out for kernel in kernels], config.cell_out)
        i = _cell_side([kernel.channels_in for kernel in kernels], config.cell_in)
        grids = [self._grid(kernel, o, i) for kernel in kernels]
        mixtures = [math.prod(grid) for grid in grids]
        n = max(int(sum(mixtures) * config.n), 1)
        self._check_size(kernels, sum(mixtures), n)
        anchors, owned = self._anchor(kernels, mixtures, n)

        self.cells = nn.Parameter(torch.empty(n, o, i * self.span))
        self._stand_in: tuple[Tensor | None, Tensor] = NOTHING
        self.draws: list[Draw] = []
        start = 0
        for k, kernel in enumerate(kernels):
            own = tuple(anchors[k]) if config.is_anchored else None
            self.draws.append(Draw(self, kernel, grids[k], own, start, owned[k]))
            start += owned[k]
        self.reset_parameters()

    @property
    def mixtures(self) -> int:
        """Mixtures of all layers together."""
        return sum(draw.mixtures for draw in self.draws)

    def drawn(self) -> Tensor:
        """The cells, for a layer's forward pass: gradients of all layers that draw go into one sum
        (compute/gathering.py).

        In eager training this is an identity of the cells: one autograd node for all layers and steps, while the
        cells are the same tensor.
        """
        cells = self.cells
        plain = type(cells) is nn.Parameter and not torch.compiler.is_compiling() and not _is_traced()
        if not (AVAILABLE and plain and cells.requires_grad and torch.is_grad_enabled()):
            return cells
        source, stand_in = self._stand_in
        same = source is cells and stand_in.data_ptr() == cells.data_ptr() and stand_in.dtype == cells.dtype
        same = same and stand_in.shape == cells.shape
        if not same:  # other cells, or moved, or made another type
            stand_in = gathered(cells)
            self._stand_in = cells, stand_in
        forget_failed(stand_in)
        return stand_in

    def _apply(self, fn: Any, recurse: bool = True) -> Warehouse:
        self._stand_in = NOTHING  # lest it hold the memory that the cells are moved away from
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stand_in": NOTHING}  # copies have cells of their own

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He normal, fan-out, layer by layer over its own cells, stacked to a kernel of `owned * o` outputs."""
        for draw in self.draws:
            own = self.cells[draw.start : draw.start + draw.owned]
            if own.numel():
                kernel = own.view(draw.owned * self.cells.shape[1], -1, self.span)
                nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")

    def extra_repr(self) -> str:
        n, o, i = self.cells.shape
        return f"{self.name!r}, n={self.config.n}: {n} cells of {o} x {i} for {len(self.draws)} layers"

    def _grid(self, kernel: KernelShape, o: int, i: int) -> tuple[int, int, int]:
        for side, channels, cell in (("out", kernel.channels_out, o), ("in", kernel.channels_in, i)):
            if channels % cell:
                raise ValueError(
                    f"Layer {kernel.name!r} has {channels} {side}put channels (per group), which cells of {cell} "
                    f"do not divide (warehouse {self.name!r}, cell_{side}={getattr(self.config, 'cell_' + side)}): "
                    f"choose cell_{side} so that the cut comes out whole, such as 1."
                )
        return kernel.positions // self.span, kernel.channels_out // o, kernel.channels_in // i

    def _anchor(self, kernels: Sequence[KernelShape], mixtures: list[int], n: int) -> tuple[Anchors, list[int]]:
        """Each layer's anchors, and how many cells are its own."""
        budget = self.config.n
        if self.config.anchoring == "one_to_one":
            anchors, given = one_to_one(mixtures, n, budget)
            self._check_given_out(kernels, mixtures, given, n)
            return anchors, [sum(cell < n for cell in own) * max(int(budget), 1) for own in anchors]
        anchors = by_lot(mixtures, n, self.name) if self.config.anchoring == "random" else all_to_one(mixtures)
        return anchors, shares(mixtures, n, budget)

    def _check_alike(self, kernels: Sequence[KernelShape]) -> None:
        """Cells that span all positions are for kernels of one size, those that are whole kernels for one shape."""
        partition = self.config.partition
        if partition == "spatial_channel":
            return
        first = kernels[0]
        for kernel in kernels:
            ours, theirs = (k.shape if partition == "none" else k.shape[2:] for k in (kernel, first))
            if ours != theirs:
                raise ValueError(
                    f"Layers {first.name!r} and {kernel.name!r} have kernels {first.shape} and {kernel.shape}, which "
                    f"cannot share cells at partition={partition!r}: let them draw from two warehouses, not both from "
                    f"{self.name!r} (kw.convert sees to that)."
                )

    def _check_size(self, kernels: Sequence[KernelShape], mixtures: int, n: int) -> None:
        if mixtures * n <= MAX_SCORES:
            return
        raise ValueError(
            f"Warehouse {self.name!r} ({kernels[0].name!r} and {len(kernels) - 1} more layers) would have {n:,} cells "
            f"for {mixtures:,} mixtures, and attentions of over {16 * n * mixtures:,} weights: its layers' channels "
            f"have small common divisors. Let fewer layers share a warehouse (sharing={self.config.sharing!r} now), or "
            f"cut larger cells ({self._cut()})."
        )

    def _cut(self) -> str:
        """How kernels are cut, for those who are advised to cut them otherwise."""
        config = self.config
        sides = "" if config.partition == "none" else f"cell_in={config.cell_in}, cell_out={config.cell_out}, "
        return f"{sides}partition={config.partition!r} now"

    def _check_given_out(self, kernels: Sequence[KernelShape], mixtures: list[int], given: int, n: int) -> None:
        """Every cell must be given out, and no more than there are: each goes to one mixture by construction."""
        if given == n:
            return
        q = self.config.n.denominator
        uneven = [(kernel.name, m) for kernel, m in zip(kernels, mixtures, strict=True) if m % q]
        layers = ", ".join(f"{name!r} ({m} mixtures)" for name, m in uneven[:4]) + (", ..." if len(uneven) > 4 else "")
        raise ValueError(
            f"Warehouse {self.name!r} has {n} cells at n={self.config.n}, but the anchoring rule gives out "
            f"{given}. Each layer's mixtures should be a multiple of {q}; these are not: {layers}. "
            f"Smaller cells make more mixtures ({self._cut()}), or let the layers draw from another warehouse or "
            f"a larger n, or be anchored otherwise (anchoring={self.config.anchoring!r} now)."
        )


class Warehouses(nn.ModuleDict):
    """A model's warehouses by name. It hands on what it is given, for `nn.Sequential` runs whatever is registered."""

    def forward(self, x: Any) -> Any:
        return x


def _cell_side(channels: Sequence[int], share: Fraction) -> int:
    return max(int(math.gcd(*channels) * share), 1)


def _is_traced() -> bool:
    """Whether torch.jit traces: it takes no tensor from outside the model that requires a gradient."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
