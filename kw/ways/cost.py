"""What each way costs, by a model small enough to follow, and so which one to take.

A way's time for one sample is the sum of what it does, each at a price:

    multiply-adds   |W| * S to apply the kernel and |W| * n to mix it; "inputs" has |W| * S * n * (1 / o + 1 / T) alone
    entries         |W| numbers of the kernel: mixed, put in place, read back
    copies          numbers copied beside: the taps for "multiply", the mixed inputs for "inputs"
    calls           library calls of the sample's own

`|W|` entries of the kernel, `S` output positions, `n` cells of `o` by `i`, `T = P * C_in / i` cells that an output group
reads. The prices are nanoseconds, fitted to `python -m scripts.ways --measure` on two cores of an AMD EPYC; only their
ratios matter. Training costs about four times as much in every way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kw.ways.task import Task


@dataclass(frozen=True)
class Prices:
    multiply_add: float
    entry: float
    copy: float = 0.0
    call: float = 0.0


MAC = 0.01
SPILLED = 6 << 20  # entries of the batch's kernels, from which they do not stay in cache

PRICES = {
    "grouped": Prices(MAC, entry=1.5),
    "grouped, spilled": Prices(MAC, entry=3.5),
    "convolve": Prices(MAC, entry=1.75, call=50_000),
    "multiply": Prices(MAC, entry=1.5, copy=1.5, call=1_000),
    "inputs": Prices(MAC, entry=0.0, copy=1.0),
}


def applies(way: str, x_shape: tuple[int, ...], task: Task) -> bool:
    """Depthwise and grouped kernels are small: the plain way is good for them. So it is for an empty batch."""
    return way == "grouped" or (x_shape[0] > 0 and task.groups == 1)


def costs(x_shape: tuple[int, ...], cells_shape: tuple[int, ...], task: Task) -> dict[str, float]:
    """Nanoseconds for the batch, expected of each way that applies.

    Args:
        x_shape: `(B, C_in, *space)`.
        cells_shape: `(n, o, i)`.
    """
    n, o, i = cells_shape
    P, R, C = task.grid
    batch, positions = x_shape[0], math.prod(task.out_size(tuple(x_shape[2:])))
    entries, reads = task.mixtures * o * i, P * C
    apply, mix = entries * positions, entries * n
    spilled = "grouped, spilled" if batch * entries > SPILLED else "grouped"
    numbers = {
        "grouped": (PRICES[spilled], apply + mix, 0),
        "convolve": (PRICES["convolve"], apply + mix, 0),
        "multiply": (PRICES["multiply"], apply + mix, 0 if task.has_one_tap else positions * reads * i),
        "inputs": (PRICES["inputs"], apply * n / o + apply * n / reads, positions * (reads + R * n) * i),
    }
    return {
        way: batch * (price.multiply_add * macs + price.entry * entries + price.copy * copies + price.call)
        for way, (price, macs, copies) in numbers.items()
        if applies(way, x_shape, task)
    }


def choose(x_shape: tuple[int, ...], cells_shape: tuple[int, ...], task: Task) -> str:
    """The way that is expected to be fastest."""
    expected = costs(x_shape, cells_shape, task)
    return min(expected, key=expected.__getitem__)
