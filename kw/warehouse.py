"""The warehouse: one tensor of kernel cells, and who draws from it (paper, sections 3.1 and 3.3).

Shapes: `n` cells in the warehouse, `o` by `i` channels of a cell, `m` mixtures in a layer,
`P` spatial positions of its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from kw.config import KWConfig
from kw.ways.gathering import gathered


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
    `anchors` holds, per mixture, the cell it equals at temperature 1; `n` stands for the zero cell.
    Cells `start` to `start + owned` are the layer's own.
    """

    warehouse: Warehouse
    kernel: KernelShape
    grid: tuple[int, int, int]
    anchors: tuple[int, ...]
    start: int
    owned: int

    @property
    def mixtures(self) -> int:
        return len(self.anchors)


class Warehouse(nn.Module):
    """Kernel cells `(n, o, i)` shared by the layers whose kernels are listed, in the network's module order.

    >>> warehouse = Warehouse([KernelShape("conv", (64, 32, 3, 3))], KWConfig(n="1/2"))
    >>> layer = KWConv2d(32, 64, 3, padding=1, draw=warehouse.draws[0])

    Layers refer to their warehouse without owning it: register it once, on the model (`kw.convert` does).

    Raises:
        ValueError: the kernels cannot be cut into cells of one size, or not every cell can be given out once.
    """

    def __init__(self, kernels: Sequence[KernelShape], config: KWConfig, *, name: str = "warehouse"):
        super().__init__()
        self.name = name
        self.config = config
        if not kernels:
            raise ValueError(f"Warehouse {name!r} has no layer to draw from it: list at least one kernel.")
        o = _cell_side([kernel.channels_out for kernel in kernels], config.cell_out)
        i = _cell_side([kernel.channels_in for kernel in kernels], config.cell_in)
        grids = [self._grid(kernel, o, i) for kernel in kernels]
        mixtures = [math.prod(grid) for grid in grids]
        n = max(int(sum(mixtures) * config.n), 1)
        anchors, given = anchor(mixtures, n, config.n)
        self._check_given_out(kernels, mixtures, given, n)

        self.cells = nn.Parameter(torch.empty(n, o, i))
        self._stand_in: Tensor | None = None
        self.draws: list[Draw] = []
        start = 0
        for kernel, grid, own in zip(kernels, grids, anchors, strict=True):
            owned = sum(cell < n for cell in own) * max(int(config.n), 1)
            self.draws.append(Draw(self, kernel, grid, tuple(own), start, owned))
            start += owned
        self.reset_parameters()

    @property
    def mixtures(self) -> int:
        """Mixtures of all layers together."""
        return sum(draw.mixtures for draw in self.draws)

    def drawn(self) -> Tensor:
        """The cells, for a layer's forward pass: gradients of all layers that draw go into one sum (ways/gathering.py).

        In eager training that is a stand-in, the same for all layers and steps while the cells are the same tensor.
        """
        cells, stand_in = self.cells, self._stand_in
        if not (torch.is_grad_enabled() and cells.requires_grad and type(cells) is nn.Parameter):
            return cells
        if torch.compiler.is_compiling():
            return cells
        if stand_in is None or stand_in.data_ptr() != cells.data_ptr() or stand_in.dtype != cells.dtype:
            self._stand_in = stand_in = gathered(cells)
        return stand_in

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stand_in": None}  # copies have cells of their own

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He normal, fan-out, layer by layer over its own cells, stacked to one `(owned * o, i)` pointwise kernel."""
        for draw in self.draws:
            own = self.cells[draw.start : draw.start + draw.owned]
            if own.numel():
                nn.init.kaiming_normal_(own.flatten(0, 1), mode="fan_out", nonlinearity="relu")

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
        return kernel.positions, kernel.channels_out // o, kernel.channels_in // i

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
            f"Smaller cells make more mixtures (cell_in={self.config.cell_in}, cell_out={self.config.cell_out} now), "
            f"or let the layers draw from another warehouse or a larger n."
        )


class Warehouses(nn.ModuleDict):
    """A model's warehouses by name. It hands on what it is given, for `nn.Sequential` runs whatever is registered."""

    def forward(self, x: Any) -> Any:
        return x


def anchor(mixtures: Sequence[int], n: int, budget: Fraction) -> tuple[list[list[int]], int]:
    """For each layer (given by its number of mixtures) the cell that each mixture is anchored to, `n` for the zero
    cell; and how many cells were given out, which is not `n` where the rule does not come out even.

    With a budget of at least 1, mixture t has cells `start + t * budget` onwards to itself and is anchored to the
    first. Below, with q = 1 / budget, one mixture in each run of q gets the next free cell, its place in the run
    moving on by one from run to run, and the others the zero cell.
    """
    layers, free = [], 0
    q = budget.denominator
    for m in mixtures:
        own = []
        for t in range(m):
            if budget >= 1:
                own.append(free + t * int(budget))
            elif t % q == (t // q) % q:
                own.append(free)
                free += 1
            else:
                own.append(n)
        if budget >= 1:
            free += m * int(budget)
        layers.append(own)
    return layers, free


def _cell_side(channels: Sequence[int], share: Fraction) -> int:
    return max(int(math.gcd(*channels) * share), 1)
