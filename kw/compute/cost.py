"""A linear cost model of each implementation, and the choice of the cheapest.

The time of a choice for a batch is a sum of quantities of work, each times a price of the device (prices.py):

    apply       multiply-adds with the kernels: |W| * S a sample
    mix         multiply-adds that make kernels from cells: |W| * n a sample. "inputs" mixes the input's taps instead:
                |W| * S * n / o, and applies |W| * S * n / T
    mix folded  multiply-adds that make kernels from folded kernels: |W| * J a sample
    fold        multiply-adds that fold the cells: |W| * n * (H + 1) a batch
    entry       the kernels' |W| numbers a sample, written and read; "grouped" also moves them
    new         kernel entries that need new pages from the system ("grouped" only, above what the allocator keeps)
    io          numbers of inputs and outputs; io and apply have separate prices for pointwise and linear layers
    copy        other numbers copied: the unfolded input of "batched", the taps and the mixed inputs of "inputs"
    cell        numbers of the warehouse, or of folded kernels, read once a batch; they dominate for one sample
    fixed       1, the cost of calling a layer
    call        matrix products that "blocks" calls: one for each tap and input cell of each block

`|W|` entries of the kernel, `S` output positions, `n` cells of `o` by `i`, `H` hidden features, `J = H + 1` terms of a
folded kernel's sum, `T = P * C_in / i` cells that an output cell reads.

Only choices with measured prices are compared. On a GPU without them, kernels are applied by "triton" where it applies,
else by batched products, and made as takes less arithmetic and memory traffic, by the ratio of a GPU's rates of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kw.compute import samples
from kw.compute.blocks import ENTRIES, ENTRIES_ON_GPU
from kw.compute.geometry import Geometry
from kw.compute.prices import Table, table
from kw.compute.tracing import is_recorded

HELD = 8 << 20  # numbers (32 MiB) that the allocator keeps; it requests larger tensors from the system each time
# Multiply-adds in the time in which a GPU writes and reads a number in half precision: 400 T/s and 3 TB/s on an H100.
MOVED = 500
# An H100 was faster with cells where folding was expected to save up to 1.6 times (docs/gpu.md).
FOLDED = 2.0
UNMEASURED = ("triton", "batched", "grouped")  # order of preference on a GPU without a table

Quantities = dict[str, float]


class Choice(NamedTuple):
    """How a layer's kernels are made ("cells", "folded") and applied (`kw.compute.IMPLEMENTATIONS`)."""

    make: str
    apply: str


class Input(NamedTuple):
    """What a choice depends on, of a layer's input."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device


def applies(name: str, make: str, x: Tensor | Input, geometry: Geometry) -> bool:
    """Whether an implementation can compute the layer for this input. "grouped" computes the rest: depthwise and
    grouped kernels, which are small, empty batches, and cells that span positions, which only ablations have."""
    if name == "grouped":
        return True
    empty = not is_recorded(x.shape) and x.shape[0] == 0
    if empty or geometry.groups != 1 or geometry.spans_positions:
        return False
    if name == "triton":
        return samples.applies(x, geometry)
    return name != "inputs" or make == "cells"


def work(
    choice: Choice, x_shape: tuple[int, ...], cells_shape: tuple[int, ...], geometry: Geometry, features: int, kind: str
) -> Quantities:
    """The quantities of work of a choice for the batch, by the names above.

    Args:
        x_shape: `(B, C_in, *space)`.
        cells_shape: `(n, o, i)`; or `(J, m, o, i)` where each mixture has a basis already.
        features: H; "cells" does not use it.
        kind: of the device.
    """
    n, (o, i) = cells_shape[0], cells_shape[-2:]
    P, R, C = geometry.grid
    batch, positions = x_shape[0], math.prod(geometry.out_size(tuple(x_shape[2:])))
    weight, reads = geometry.mixtures * o * i, P * C
    kernels = batch * weight
    if choice.apply == "inputs":
        return {
            "apply": kernels * positions * n / reads,
            "mix": kernels * positions * n / o,
            "copy": batch * positions * (reads + R * n) * i,
            "cell": n * o * i,
            "fixed": 1,
        }
    # Libraries compute pointwise and linear layers by other code.
    of_kind = " pointwise" if P == 1 else ""
    done: Quantities = {
        f"apply{of_kind}": kernels * positions,
        f"io{of_kind}": batch * (math.prod(x_shape[1:]) + positions * R * o),
        "entry": kernels,
        "fixed": 1,
    }
    if choice.make == "cells":
        done = {**done, "mix": kernels * n, "cell": n * o * i}
    else:
        folds = len(cells_shape) == 3
        terms = features + 1 if folds else n
        fold = weight * n * terms if folds else 0
        done = {**done, "mix folded": kernels * terms, "fold": fold, "cell": weight * terms}
    if choice.apply == "grouped":
        done["new"] = kernels if kernels > HELD else 0
    if choice.apply == "batched":
        done["copy"] = 0 if geometry.is_pointwise else batch * P * C * i * positions
    if choice.apply == "blocks":
        done["call"] = reads * math.ceil(kernels / (ENTRIES if kind == "cpu" else ENTRIES_ON_GPU))
    return done


def multiply_adds(done: Quantities) -> float:
    return sum(quantity for name, quantity in done.items() if name.startswith(("apply", "mix", "fold")))


def cost(choice: Choice, done: Quantities, prices: Table, step: bool) -> float | None:
    """Expected nanoseconds for the batch; None if the choice was not measured.

    Args:
        done: the choice's quantities of work.
        step: forward and backward, not only forward.
    """
    known = (prices.step if step else prices.forward).get(choice.apply, {})
    if any(name.startswith(("mix", "fold")) and quantity and name not in known for name, quantity in done.items()):
        return None
    return sum(known.get(name, 0.0) * quantity for name, quantity in done.items())


def best(
    possible: tuple[Choice, ...],
    x_shape: tuple[int, ...],
    cells_shape: tuple[int, ...],
    geometry: Geometry,
    features: int,
    step: bool,
    kind: str,
) -> Choice:
    """The choice that is expected to be fastest. Arguments as in `work` and `cost`."""
    prices = table(kind)
    if prices is None or not (prices.step if step else prices.forward):
        return _unmeasured(possible, x_shape, cells_shape, geometry, features, kind)
    found, least = possible[0], math.inf
    for choice in possible:  # not min(), which torch.compile cannot follow where sizes vary
        expected = cost(choice, work(choice, x_shape, cells_shape, geometry, features, kind), prices, step)
        if expected is not None and expected < least:
            found, least = choice, expected
    return found


def _unmeasured(
    possible: tuple[Choice, ...],
    x_shape: tuple[int, ...],
    cells_shape: tuple[int, ...],
    geometry: Geometry,
    features: int,
    kind: str,
) -> Choice:
    order = UNMEASURED if kind.startswith(("cuda", "rocm")) else ("grouped",)
    name = next((name for name in order if any(choice.apply == name for choice in possible)), possible[0].apply)
    found, least = possible[0], math.inf
    for choice in possible:
        done = work(choice, x_shape, cells_shape, geometry, features, kind)
        # Kernels, and folded kernels, are written and read.
        folded = choice.make == "folded" and len(cells_shape) == 3
        # Of making kernels; applying them is the same.
        making = sum(quantity for name, quantity in done.items() if name.startswith(("mix", "fold")))
        cost = making + MOVED * (done.get("entry", 0) + (done["cell"] if folded else 0))
        cost *= FOLDED if folded else 1
        if choice.apply == name and cost < least:
            found, least = choice, cost
    return found
