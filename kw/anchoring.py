"""Anchoring: which cell each mixture equals at temperature 1 (paper, section 3.3), and which cells are a layer's own.

`one_to_one` is the published rule; the others are the paper's ablations of it. A cell is numbered from 0 in its
warehouse; `n`, one past the last, stands for the zero cell.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from fractions import Fraction

Anchors = list[list[int]]  # layer by layer, a cell for each mixture


def one_to_one(mixtures: Sequence[int], n: int, budget: Fraction) -> tuple[Anchors, int]:
    """For each layer (given by its number of mixtures) the cell that each mixture is anchored to; and how many cells
    were given out, which is not `n` where the rule does not come out even.

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


def all_to_one(mixtures: Sequence[int]) -> Anchors:
    """Every mixture is anchored to the warehouse's first cell."""
    return [[0] * m for m in mixtures]


def by_lot(mixtures: Sequence[int], n: int, name: str) -> Anchors:
    """Each mixture is anchored to any of the `n` cells, by a lot that falls the same for warehouses of one name and
    size: a checkpoint, which has no anchors in it, gets those that it was trained with."""
    lot = random.Random(f"{name}, {n} cells")  # a text as its seed gives the same numbers in every process
    return [[int(lot.random() * n) for _ in range(m)] for m in mixtures]


def shares(mixtures: Sequence[int], n: int, budget: Fraction) -> list[int]:
    """How many cells are a layer's own where anchors do not say so: `budget` a mixture, what is left over included.

    These cells are initialized for the layer.
    """
    ends = [int(total * budget) for total in itertools.accumulate(mixtures)]
    return [end - start for start, end in itertools.pairwise([0, *ends[:-1], n])]
