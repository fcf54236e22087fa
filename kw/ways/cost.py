"""What each way costs, by a model small enough to follow, and so which one to take.

A way's time for a batch is the sum of what it does, each at a price:

    apply    multiply-adds with the kernels: |W| * S a sample
    mix      multiply-adds that make them of the cells: |W| * n a sample. "inputs" mixes the input's taps instead:
             |W| * S * n / o, and applies |W| * S * n / T
    entry    the kernels' |W| numbers a sample, written and read again; "grouped" also moves them
    new      those of them that come in new memory: of "grouped", where the batch's do not fit what the allocator keeps
    io       the samples' inputs and outputs
    copy     numbers copied beside: the taps and the mixed inputs of "inputs"
    cell     the warehouse's numbers, read once for all samples: most of the time for a single one
    call     products that "multiply" calls the library for: each tap and input group of each block

`|W|` entries of the kernel, `S` output positions, `n` cells of `o` by `i`, `T = P * C_in / i` cells that an output
group reads. The prices are nanoseconds; only their ratios matter. Those of a CPU are fitted by
`python -m scripts.fit_prices`, which says how well. Those of a GPU are guesses from what an H100 can multiply and read.
"""

from __future__ import annotations

import math

from kw.ways.task import Task

MARGIN = 0.9  # of the plain way's time that another must stay below: what is closer is decided by noise
HELD = 8 << 20  # numbers (32 MiB): memory for more comes new from the system each time, page fault by page fault
BLOCK = 4 << 20  # entries that "multiply" has in a block

Prices = dict[str, dict[str, float]]

CPU_FORWARD: Prices = {}
CPU_STEP: Prices = {}
GPU: Prices = {
    "grouped": {"apply": 2e-5, "mix": 2e-6, "entry": 0.02},  # the libraries are slow on so many groups
    "multiply": {"apply": 3e-6, "mix": 2e-6, "entry": 0.01, "call": 10_000},
    "inputs": {"apply": 2e-6, "mix": 2e-6, "copy": 0.004},
}


def applies(way: str, x_shape: tuple[int, ...], task: Task) -> bool:
    """Depthwise and grouped kernels are small: the plain way is good for them. So it is for an empty batch."""
    return way == "grouped" or (x_shape[0] > 0 and task.groups == 1)


def work(x_shape: tuple[int, ...], cells_shape: tuple[int, ...], task: Task) -> dict[str, dict[str, float]]:
    """What each way that applies does for the batch, by the names above.

    Args:
        x_shape: `(B, C_in, *space)`.
        cells_shape: `(n, o, i)`.
    """
    n, o, i = cells_shape
    P, R, C = task.grid
    batch, positions = x_shape[0], math.prod(task.out_size(tuple(x_shape[2:])))
    kernels, reads = batch * task.mixtures * o * i, P * C
    plain = {"apply": kernels * positions, "mix": kernels * n, "entry": kernels, "cell": n * o * i}
    plain["io"] = batch * (math.prod(x_shape[1:]) + positions * R * o)
    done: dict[str, dict[str, float]] = {
        "grouped": {**plain, "new": kernels if kernels > HELD else 0},
        "multiply": {**plain, "call": reads * math.ceil(kernels / BLOCK)},
        "inputs": {
            "apply": kernels * positions * n / reads,
            "mix": kernels * positions * n / o,
            "copy": batch * positions * (reads + R * n) * i,
            "cell": n * o * i,
        },
    }
    return {way: quantities for way, quantities in done.items() if applies(way, x_shape, task)}


def costs(
    x_shape: tuple[int, ...], cells_shape: tuple[int, ...], task: Task, step: bool = False, device: str = "cpu"
) -> dict[str, float]:
    """Nanoseconds for the batch, expected of each way that applies.

    Args:
        x_shape, cells_shape: as for `work`.
        step: forward and backward, not forward alone.
        device: "cpu", or anything else for a GPU.
    """
    prices = (CPU_STEP if step else CPU_FORWARD) if device == "cpu" else GPU
    return {
        way: sum(prices[way].get(name, 0.0) * quantity for name, quantity in quantities.items())
        for way, quantities in work(x_shape, cells_shape, task).items()
    }


def cheapest(expected: dict[str, float]) -> str:
    """The way that is expected to be fastest; the plain one unless another is so by a margin."""
    way = min(expected, key=expected.__getitem__)
    return way if expected[way] < MARGIN * expected["grouped"] else "grouped"
