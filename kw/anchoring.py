"""Anchoring: which cell each mixture equals at temperature 1 (paper, section 3.3), and which cells are a layer's own.

`one_to_one` is the published rule; the others are the paper's ablations of it. Cells are numbered from 0 in their
warehouse; `n`, one past the last, stands for the zero cell.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from fractions import Fraction

Anchors = list[list[int]]  # for each layer, a cell for each mixture


def one_to_one(mixtures: Sequence[int], n: int, budget: Fraction) -> Anchors:
    """The cell that each mixture is anchored to.

    With a budget of at least 1, mixture t has `budget` cells from `start + t * budget` on for itself, and is anchored
    to the first. Below, with q = 1 / budget, one mixture in each run of q is anchored to the next free cell; its place
    in the run advances by one from run to run. The others are anchored to the zero cell.

    Args:
        mixtures: of each layer.
        n: cells of the warehouse, those that `cells_of` assigns.
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
    return layers


def cells_of(mixtures: int, budget: Fraction) -> int:
    """How many cells `one_to_one` assigns to a layer of so many mixtures: `budget` each; below 1, one in each run of q,
    and in a last shorter run one or none, so that every layer has at least one. Where layers divide evenly, as all
    published ones do, they are budget times the mixtures."""
    if budget >= 1:
        return mixtures * int(budget)
    runs, rest = divmod(mixtures, budget.denominator)
    return runs + (runs % budget.denominator < rest)


def all_to_one(mixtures: Sequence[int]) -> Anchors:
    """Every mixture is anchored to the warehouse's first cell."""
    return [[0] * m for m in mixtures]


def at_random(mixtures: Sequence[int], n: int, name: str) -> Anchors:
    """Each mixture is anchored to one of the `n` cells at random, seeded by the warehouse's name and size, so that
    checkpoints need not save anchors."""
    generator = random.Random(f"{name}, {n} cells")  # a text as seed gives the same numbers in every process
    return [[int(generator.random() * n) for _ in range(m)] for m in mixtures]


def own_cells(mixtures: Sequence[int], n: int, budget: Fraction) -> list[int]:
    """How many cells are each layer's own where anchors do not say so: `budget` a mixture, and for the last layer what
    is left over. These cells are initialized for the layer."""
    ends = [int(total * budget) for total in itertools.accumulate(mixtures)]
    return [end - start for start, end in itertools.pairwise([0, *ends[:-1], n])]
