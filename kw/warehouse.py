"""The warehouse: one tensor of kernel cells, and the layers that share it (paper, sections 3.1 and 3.3).

Shapes: `n` cells in the warehouse, `o` by `i` channels of a cell, `m` mixtures in a layer, `P` positions of its kernel.

A cell is at one position. In two of the paper's ablations (`KWConfig.partition`) it spans all of them. Then `i` counts
input channels times positions, and `P` is 1 wherever kernels are cut.

Each layer has its warehouse as a submodule, and several layers have the same one. So whoever holds a layer holds its
cells, and they are listed, moved, optimized and saved once, under the name of the first layer that uses them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kw.anchoring import Anchors, all_to_one, at_random, cells_of, one_to_one, own_cells
from kw.compute.gathering import Gatherer
from kw.config import KWConfig
from kw.owners import OneEntry, Owners

# Upper limit of mixtures times cells. Each product takes at least 16 weights in the attentions, whose hidden layers are
# at least 16 wide: 134 million in all.
MAX_SCORES = 1 << 23


@dataclass(frozen=True)
class KernelShape:
    """A layer's kernel: its `name` for messages, and its shape `(C_out, C_in / groups, *kernel_size)`, as that of
    `nn.Conv2d.weight`."""

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
class Share:
    """One layer's share of a warehouse.

    Args:
        grid: `(P, C_out / o, C_in / i)`, the kernel's cells in the order of its mixtures, the last index fastest.
        anchors: for each mixture the cell that it equals at temperature 1; `n` is the zero cell. None: no anchors.
        start, owned: cells `start` to `start + owned - 1` are the layer's own: they are initialized for it.
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
    >>> layer = KWConv2d(32, 64, 3, padding=1, share=warehouse.shares[0])

    Its forward pass returns the cells. Layers call it, so that hooks on it take effect: those that load offloaded
    parameters, or gather sharded ones.

    Raises:
        ValueError: the kernels cannot be cut into cells of one size, or there are so many cells that the attentions
            would have billions of weights.
    """

    def __init__(self, kernels: Sequence[KernelShape], config: KWConfig, *, name: str = "warehouse"):
        super().__init__()
        self.name = name
        self.config = config
        if not kernels:
            raise ValueError(f"Warehouse {name!r} has no layer: list at least one kernel.")
        self._check_alike(kernels)
        o, i, self.span = cell_size([kernel.shape for kernel in kernels], config)
        grids = [self._grid(kernel, o, i) for kernel in kernels]
        mixtures = [math.prod(grid) for grid in grids]
        n = number_of_cells(mixtures, config)
        self._check_size(kernels, sum(mixtures), n)
        anchors, owned = self._anchor(kernels, mixtures, n)

        self.cells = nn.Parameter(torch.empty(n, o, i * self.span))
        # Copies and saved files start with new ones of these.
        self._gatherer = Gatherer()  # must be forgotten when cells move
        self.owners, self._entry = Owners(), OneEntry()
        self.is_sharded = False  # whether FSDP manages the cells
        self.shares: list[Share] = []
        start = 0
        for k, kernel in enumerate(kernels):
            anchored = tuple(anchors[k]) if config.is_anchored else None
            self.shares.append(Share(self, kernel, grids[k], anchored, start, owned[k]))
            start += owned[k]
        self.reset_parameters()

    @property
    def mixtures(self) -> int:
        """Mixtures of all layers together."""
        return sum(share.mixtures for share in self.shares)

    def forward(self) -> Tensor:
        """The cells `(n, o, i)` for a layer's forward pass. In eager training it is an identity of them that adds the
        gradients of all layers into one sum (compute/gathering.py).

        Raises:
            RuntimeError: FSDP has sharded the cells, and not gathered them for this layer.
        """
        if not self.is_sharded:
            return self._gatherer(self.cells)
        if type(self.cells) is not nn.Parameter:
            raise self.sharded_error()
        # FSDP reduces gradients when a part's backward pass ends, and the identity's may come later. A new tensor for
        # each layer, because FSDP adds a hook to it in each forward pass.
        return self.cells.view_as(self.cells)

    def sharded_error(self) -> RuntimeError:
        """What a layer raises that finds the cells sharded."""
        return RuntimeError(
            f"The cells of warehouse {self.name!r} are sharded: the part of the model that FSDP shards them with is "
            f"not the only one that uses them. Shard warehouses first, each alone, and let them stay whole in the "
            f"forward pass: for w in model.warehouses.values(): fully_shard(w, reshard_after_forward=False)."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "cells" and type(value) is not nn.Parameter and hasattr(value, "placements"):
            self.is_sharded = True  # a DTensor: FSDP replaces the parameter, and puts the whole one here at times
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._entry.is_new(destination, prefix, "cells", self.cells):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        self._entry.report(missing_keys, missing)

    def _apply(self, fn: Any, recurse: bool = True) -> Warehouse:
        self._gatherer.forget()  # or it would hold the memory that the cells leave
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He normal with fan-out, for each layer over its own cells, stacked to a kernel of `owned * o` outputs."""
        for share in self.shares:
            own = self.cells[share.start : share.start + share.owned]
            if own.numel():
                kernel = own.view(share.owned * self.cells.shape[1], -1, self.span)
                nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")

    def extra_repr(self) -> str:
        n, o, i = self.cells.shape
        return f"{self.name!r}, n={self.config.n}: {n} cells of {o} x {i} for {len(self.shares)} layers"

    def _grid(self, kernel: KernelShape, o: int, i: int) -> tuple[int, int, int]:
        for side, channels, cell in (("out", kernel.channels_out, o), ("in", kernel.channels_in, i)):
            if channels % cell:
                raise ValueError(
                    f"Layer {kernel.name!r} has {channels} {side}put channels (per group), which cells of {cell} "
                    f"do not divide (warehouse {self.name!r}, cell_{side}={getattr(self.config, 'cell_' + side)}): "
                    f"choose a cell_{side} that divides them, such as 1."
                )
        return kernel.positions // self.span, kernel.channels_out // o, kernel.channels_in // i

    def _anchor(self, kernels: Sequence[KernelShape], mixtures: list[int], n: int) -> tuple[Anchors, list[int]]:
        """Each layer's anchors, and its number of own cells."""
        budget = self.config.n
        if self.config.anchoring == "one_to_one":
            return one_to_one(mixtures, n, budget), [cells_of(m, budget) for m in mixtures]
        anchors = at_random(mixtures, n, self.name) if self.config.anchoring == "random" else all_to_one(mixtures)
        return anchors, own_cells(mixtures, n, budget)

    def _check_alike(self, kernels: Sequence[KernelShape]) -> None:
        """Cells that span all positions need kernels of one size; cells that are kernels need kernels of one shape."""
        partition = self.config.partition
        if partition == "spatial_channel":
            return
        first = kernels[0]
        for kernel in kernels:
            ours, theirs = (k.shape if partition == "none" else k.shape[2:] for k in (kernel, first))
            if ours != theirs:
                raise ValueError(
                    f"Layers {first.name!r} and {kernel.name!r} have kernels {first.shape} and {kernel.shape}, which "
                    f"cannot share cells at partition={partition!r}: put them in two warehouses, not both in "
                    f"{self.name!r} (kw.convert does that)."
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
        """How kernels are cut, for messages that suggest another cut."""
        config = self.config
        sides = "" if config.partition == "none" else f"cell_in={config.cell_in}, cell_out={config.cell_out}, "
        return f"{sides}partition={config.partition!r} now"


class Warehouses(nn.ModuleDict):
    """A model's warehouses by name: `model.warehouses`. It is not a submodule of the model, whose layers have them."""


def number_of_cells(mixtures: Sequence[int], config: KWConfig) -> int:
    """The cells of a warehouse whose layers have so many mixtures each: n times as many, except that with the published
    anchoring each layer has a whole number of them, at least one."""
    if config.anchoring == "one_to_one":
        return sum(cells_of(m, config.n) for m in mixtures)
    return max(int(sum(mixtures) * config.n), 1)


def cell_size(kernels: Sequence[tuple[int, ...]], config: KWConfig) -> tuple[int, int, int]:
    """Output channels, input channels and positions of a cell of a warehouse for kernels of these shapes."""
    o = math.gcd(*(shape[0] for shape in kernels)) * config.cell_out
    i = math.gcd(*(shape[1] for shape in kernels)) * config.cell_in
    return max(int(o), 1), max(int(i), 1), 1 if config.partition == "spatial_channel" else math.prod(kernels[0][2:])
