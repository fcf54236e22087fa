"""What each way costs, by a model small enough to follow, and so which one to take.

A way's time for a batch is the sum of what it does, each at a price:

    apply    multiply-adds with the kernels: |W| * S a sample
    mix      multiply-adds that make them of the cells: |W| * n a sample. "inputs" mixes the input's taps instead:
             |W| * S * n / o, and applies |W| * S * n / T
    entry    the kernels' |W| numbers a sample, written and read again; "grouped" also moves them
    new      those of them that come in new memory: of "grouped", where the batch's do not fit what the allocator keeps
    io       the samples' inputs and outputs; of pointwise and linear layers, these two have prices of their own
    copy     numbers copied beside: the taps and the mixed inputs of "inputs"
    cell     the warehouse's numbers, read once for all samples: most of the time for a single one
    fixed    one, for each call of a way
    call     products that "multiply" calls the library for: each tap and input group of each block

`|W|` entries of the kernel, `S` output positions, `n` cells of `o` by `i`, `T = P * C_in / i` cells that an output
group reads. K kernels of another method (kw/baselines) count as n = K * P cells, though its "grouped" mixes but K.

The prices are nanoseconds; only their ratios matter. Those of a CPU are fitted by
`python -m scripts.fit_prices --repeats 1` on two cores of an AMD EPYC: expected over measured times were between 0.5
and 1.25 for four in five of 184 kinds of layer. On the same layers, choosing by them took 1% longer than the better of
"grouped" and "multiply" for each (all "grouped": 60% longer for a step, 89% forward; all "multiply": 3 to 6%). Those of
a GPU are guesses from what an H100 can multiply and read.
"""

from __future__ import annotations

import math

from kw.ways.multiply import ENTRIES, ENTRIES_ON_GPU
from kw.ways.task import Task

HELD = 8 << 20  # numbers (32 MiB): memory for more comes new from the system each time, page fault by page fault

Prices = dict[str, dict[str, float]]

CPU_FORWARD: Prices = {
    "grouped": {
        "apply": 0.0094,
        "apply pointwise": 0.0098,
        "cell": 0.53,
        "entry": 0.62,
        "fixed": 4.3e5,
        "io": 0.55,
        "io pointwise": 0.48,
        "mix": 0.019,
        "new": 2.2,
    },
    "multiply": {
        "apply": 0.011,
        "apply pointwise": 0.01,
        "call": 2.2e5,
        "cell": 0.29,
        "entry": 0.58,
        "fixed": 3.5e5,
        "io": 1.2,
        "io pointwise": 0.26,
        "mix": 0.0075,
    },
    "inputs": {"apply": 0.0066, "cell": 2.7, "copy": 0.46, "fixed": 4e6, "mix": 0.19},
}
CPU_STEP: Prices = {
    "grouped": {
        "apply": 0.033,
        "apply pointwise": 0.03,
        "cell": 2,
        "entry": 1.9,
        "fixed": 1e6,
        "io": 1.7,
        "io pointwise": 1.5,
        "mix": 0.062,
        "new": 8.5,
    },
    "multiply": {
        "apply": 0.028,
        "apply pointwise": 0.032,
        "call": 7.3e5,
        "cell": 1.9,
        "entry": 1.8,
        "fixed": 8.2e5,
        "io": 4.4,
        "io pointwise": 1.1,
        "mix": 0.041,
    },
    "inputs": {"apply": 0.023, "cell": 6, "copy": 1.4, "fixed": 9.3e6, "mix": 0.4},
}
GPU: Prices = {
    # The libraries are slow on so many groups.
    "grouped": {"apply": 2e-5, "apply pointwise": 2e-5, "mix": 2e-6, "entry": 0.02},
    "multiply": {"apply": 3e-6, "apply pointwise": 3e-6, "mix": 2e-6, "entry": 0.01, "call": 10_000},
    "inputs": {"apply": 2e-6, "mix": 2e-6, "copy": 0.004},
}


def applies(way: str, x_shape: tuple[int, ...], task: Task) -> bool:
    """Depthwise and grouped kernels are small: the plain way is good for them. So it is for an empty batch. And cells
    that span positions, which only ablations have, are for the plain way alone."""
    return way == "grouped" or (x_shape[0] > 0 and task.groups == 1 and not task.spans_positions)


def work(
    x_shape: tuple[int, ...], cells_shape: tuple[int, ...], task: Task, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """What each way that applies does for the batch, by the names above.

    Args:
        x_shape: `(B, C_in, *space)`.
        cells_shape: `(n, o, i)`.
        device: "cpu", or anything else for a GPU.
    """
    n, o, i = cells_shape
    P, R, C = task.grid
    batch, positions = x_shape[0], math.prod(task.out_size(tuple(x_shape[2:])))
    kernels, reads = batch * task.mixtures * o * i, P * C
    # Pointwise layers, linear ones among them, are another kind of work for the libraries.
    kind = " pointwise" if P == 1 else ""
    plain: dict[str, float] = {
        f"apply{kind}": kernels * positions,
        f"io{kind}": batch * (math.prod(x_shape[1:]) + positions * R * o),
        "mix": kernels * n,
        "entry": kernels,
        "cell": n * o * i,
        "fixed": 1,
    }
    done: dict[str, dict[str, float]] = {
        "grouped": {**plain, "new": kernels if kernels > HELD else 0},
        "multiply": {**plain, "call": reads * math.ceil(kernels / (ENTRIES if device == "cpu" else ENTRIES_ON_GPU))},
        "inputs": {
            "apply": kernels * positions * n / reads,
            "mix": kernels * positions * n / o,
            "copy": batch * positions * (reads + R * n) * i,
            "cell": n * o * i,
            "fixed": 1,
        },
    }
    return {way: quantities for way, quantities in done.items() if applies(way, x_shape, task)}


def costs(
    x_shape: tuple[int, ...], cells_shape: tuple[int, ...], task: Task, step: bool = False, device: str = "cpu"
) -> dict[str, float]:
    """Nanoseconds for the batch, expected of each way that applies.

    Args:
        x_shape, cells_shape, device: as for `work`.
        step: forward and backward, not forward alone.
    """
    prices = (CPU_STEP if step else CPU_FORWARD) if device == "cpu" else GPU
    return {
        way: sum(prices[way].get(name, 0.0) * quantity for name, quantity in quantities.items())
        for way, quantities in work(x_shape, cells_shape, task, device).items()
    }


def cheapest(expected: dict[str, float]) -> str:
    """The way that is expected to be fastest."""
    best = next(iter(expected))
    for way in expected:  # not min(), which torch.compile cannot follow where sizes vary
        if expected[way] < expected[best]:
            best = way
    return best
