"""What each way costs, by a model small enough to follow, and so which one to take.

A way's time for a batch is the sum of what it does, each at a price:

    apply    multiply-adds with the kernel: |W| * S a sample
    mix      multiply-adds that make it of the cells: |W| * n a sample. "inputs" mixes the input's taps instead:
             |W| * S * n / o, and applies |W| * S * n / T
    entry    the kernel's |W| numbers, written, moved and read again; dearer where the batch's do not fit the allocator
    io       the sample's inputs and outputs
    copy     numbers copied beside: the taps for "multiply", the mixed inputs for "inputs"
    call     calls of the library for each sample
    cell     the warehouse's numbers, read once for all samples: most of the time for a single one

`|W|` entries of the kernel, `S` output positions, `n` cells of `o` by `i`, `T = P * C_in / i` cells that an output
group reads. The prices are nanoseconds; only their ratios matter. Those of a CPU are fitted (least squares of relative
errors) to `python -m scripts.ways ... --measure` for ResNet18, ResNet50, ConvNeXt-Tiny and MobileNetV2 with batches of
1, 8 and 16 on two cores of an AMD EPYC. Those of a GPU are guesses from what an H100 can multiply and read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kw.ways.task import Task

MARGIN = 0.9  # of the plain way's time that another must stay below: what is closer is decided by noise
HELD = 8 << 20  # numbers (32 MiB): memory for more comes new from the system each time, page fault by page fault


@dataclass(frozen=True)
class Prices:
    apply: float
    mix: float
    entry: float = 0.0
    cell: float = 0.0
    io: float = 0.0
    copy: float = 0.0
    call: float = 0.0


CPU_FORWARD = {
    "grouped": Prices(apply=0.0097, mix=0.014, entry=0.84, cell=0.63, io=0.84),
    "grouped, new memory": Prices(apply=0, mix=0.016, entry=4.1),
    "convolve": Prices(apply=0.0096, mix=0.0047, entry=1.3, cell=0.32, io=1.2, call=270_000),
    "multiply": Prices(apply=0.0075, mix=0.0054, entry=1.0, cell=0.31, io=0.53, copy=1.7, call=150_000),
    "inputs": Prices(apply=0.003, mix=0, cell=2.8, copy=2.2),
}
CPU_STEP = {
    "grouped": Prices(apply=0.029, mix=0.035, entry=3.4, cell=2.0, io=2.4),
    "grouped, new memory": Prices(apply=0, mix=0.053, entry=11),
    "convolve": Prices(apply=0.027, mix=0.036, entry=3.8, cell=2.1, io=3.0, call=760_000),
    "multiply": Prices(apply=0.018, mix=0.035, entry=2.8, cell=2.1, io=3.3, copy=4.9, call=570_000),
    "inputs": Prices(apply=0.016, mix=0.2, cell=4.3, copy=6.7),
}
GPU = {
    "grouped": Prices(apply=2e-5, mix=2e-6, entry=0.02),  # the libraries are slow on so many groups
    "convolve": Prices(apply=4e-6, mix=2e-6, entry=0.01, call=20_000),
    "multiply": Prices(apply=3e-6, mix=2e-6, entry=0.01, copy=0.002),
    "inputs": Prices(apply=2e-6, mix=2e-6, copy=0.004),
}


def applies(way: str, x_shape: tuple[int, ...], task: Task) -> bool:
    """Depthwise and grouped kernels are small: the plain way is good for them. So it is for an empty batch. And cells
    that span positions, which only ablations have, are for the plain way alone."""
    return way == "grouped" or (x_shape[0] > 0 and task.groups == 1 and not task.spans_positions)


def costs(
    x_shape: tuple[int, ...], cells_shape: tuple[int, ...], task: Task, step: bool = False, device: str = "cpu"
) -> dict[str, float]:
    """Nanoseconds for the batch, expected of each way that applies.

    Args:
        x_shape: `(B, C_in, *space)`.
        cells_shape: `(n, o, i)`.
        step: forward and backward, not forward alone.
        device: "cpu", or anything else for a GPU.
    """
    n, o, i = cells_shape
    P, R, C = task.grid
    batch, positions = x_shape[0], math.prod(task.out_size(tuple(x_shape[2:])))
    kernel, reads = task.mixtures * o * i, P * C
    prices = (CPU_STEP if step else CPU_FORWARD) if device == "cpu" else GPU
    taps = 0 if task.has_one_tap else positions * reads * i
    work = {  # of one sample: apply, mix, entries, copies, calls
        "grouped": (kernel * positions, kernel * n, kernel, 0, 0),
        "convolve": (kernel * positions, kernel * n, kernel, 0, 1),
        "multiply": (kernel * positions, kernel * n, kernel, taps, 1),
        "inputs": (kernel * positions * n / reads, kernel * positions * n / o, 0, positions * (reads + R * n) * i, 0),
    }
    io = positions * (C * i + R * o)
    expected = {}
    for way, (apply, mix, entries, copies, calls) in work.items():
        if applies(way, x_shape, task):
            new_memory = way == "grouped" and batch * kernel > HELD and device == "cpu"
            price = prices["grouped, new memory" if new_memory else way]
            sample = (
                price.apply * apply
                + price.mix * mix
                + price.entry * entries
                + price.io * io
                + price.copy * copies
                + price.call * calls
            )
            expected[way] = batch * sample + price.cell * n * o * i
    return expected


def cheapest(expected: dict[str, float]) -> str:
    """The way that is expected to be fastest; the plain one unless another is so by a margin."""
    way = min(expected, key=expected.__getitem__)
    return way if expected[way] < MARGIN * expected["grouped"] else "grouped"
