"""Warehouses: how kernels are cut, which cell each mixture is anchored to, and that every cell is owned once."""

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
from helpers import reference

from kw import KernelShape, KWConfig, Warehouse

BUDGETS = [Fraction(1, 8), Fraction(1, 4), Fraction(1, 3), Fraction(1, 2), 1, 2, 3, 4, 8]


def one_cell_per_position(mixtures, budget):
    """A warehouse whose layers have exactly these numbers of mixtures."""
    kernels = [KernelShape(f"layer{k}", (1, 1, m)) for k, m in enumerate(mixtures)]
    return Warehouse(kernels, KWConfig(n=budget, cell_in=1, cell_out=1), name="house")


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("mixtures", [[24], [24, 48], [8 * 9, 24, 48 * 5]], ids=str)
def test_anchors_follow_the_rule(mixtures, budget):
    cells, layers, _ = reference.hand_out(mixtures, budget)
    warehouse = one_cell_per_position(mixtures, budget)
    assert len(warehouse.cells) == cells
    for share, own in zip(warehouse.shares, layers, strict=True):
        assert list(share.anchors) == [cells if cell is None else cell for cell in own]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_every_cell_is_assigned_once_and_every_layer_has_one(budget):
    """Over every one, two or three layers of 1 to 9 mixtures. Where layers do not divide evenly, each is rounded."""
    for mixtures in [[m] for m in range(1, 40)] + [list(m) for k in (2, 3) for m in product(range(1, 10), repeat=k)]:
        cells, _, evenly = reference.hand_out(mixtures, budget)
        warehouse = one_cell_per_position(mixtures, budget)
        n = len(warehouse.cells)
        assigned = [cell for share in warehouse.shares for cell in share.anchors if cell < n]
        step = max(int(budget), 1)
        assert assigned == list(range(0, n, step)), mixtures
        assert n == cells or not evenly
        for share in warehouse.shares:
            assert abs(share.owned - budget * share.mixtures) < 1 or share.owned == 1
            assert share.owned >= 1


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_layers_own_consecutive_cells_that_together_are_all(budget):
    warehouse = one_cell_per_position([24, 48, 24], budget)
    owned = [cell for share in warehouse.shares for cell in range(share.start, share.start + share.owned)]
    assert owned == list(range(len(warehouse.cells)))
    for share in warehouse.shares:
        real = [cell for cell in share.anchors if cell < len(warehouse.cells)]
        assert all(share.start <= cell < share.start + share.owned for cell in real)
        assert len(set(real)) == len(real) == min(1, budget) * share.mixtures


@pytest.mark.parametrize(
    ("shapes", "config", "cells", "grids"),
    [
        ([(64, 32, 3, 3)], KWConfig(n=1), (9, 64, 32), [(9, 1, 1)]),
        ([(64, 32, 3, 3), (32, 48, 1, 1)], KWConfig(n=1), (39, 32, 16), [(9, 2, 2), (1, 1, 3)]),
        ([(64, 32, 3, 3)], KWConfig(n="1/2"), (18, 32, 16), [(9, 2, 2)]),
        ([(64, 32, 3, 3)], KWConfig(n="1/4", cell_in="1/8"), (36, 32, 4), [(9, 2, 8)]),
        ([(10, 1280)], KWConfig(n=1, cell_in=1 / 40), (40, 10, 32), [(1, 1, 40)]),
        ([(8, 1, 7)], KWConfig(n=2, cell_in="1/2"), (14, 8, 1), [(7, 1, 1)]),  # at least one channel
        ([(9, 4)], KWConfig(n=1, cell_out="1/3"), (3, 3, 4), [(1, 3, 1)]),
        ([(8, 4, 3, 3, 3)], KWConfig(n=4), (108, 8, 4), [(27, 1, 1)]),
    ],
    ids=str,
)
def test_cells_have_the_sides_of_the_greatest_common_divisor(shapes, config, cells, grids):
    warehouse = Warehouse([KernelShape(f"layer{k}", shape) for k, shape in enumerate(shapes)], config)
    assert tuple(warehouse.cells.shape) == cells
    assert [share.grid for share in warehouse.shares] == grids
    assert warehouse.mixtures == sum(math.prod(grid) for grid in grids)


def test_kernel_that_cannot_be_cut_is_refused_by_layer_and_warehouse_with_a_way_out():
    kernels = [KernelShape("stage.conv", (9, 4, 3, 3))]
    with pytest.raises(ValueError) as error:
        Warehouse(kernels, KWConfig(n="1/2"), name="stage7")  # 9 * 1/2, truncated, is 4
    for part in ("'stage.conv'", "'stage7'", "9 output channels", "cells of 4", "cell_out"):
        assert part in str(error.value)
    Warehouse(kernels, KWConfig(n="1/2", cell_out="1/9"), name="stage7")
    with pytest.raises(ValueError, match=r"'stage\.conv'.* 9 input channels.*'stage7', cell_in"):
        Warehouse([KernelShape("stage.conv", (4, 9))], KWConfig(n="1/2"), name="stage7")


def test_warehouse_of_no_layers_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'house'.*no layer"):
        Warehouse([], KWConfig(), name="house")


@pytest.mark.parametrize("n", ["1/2", 1, 4])
def test_cells_are_he_normal_over_what_a_layer_owns(n):
    """Each layer's slice, viewed as a (cells * o, i, 1, 1) kernel, has fan-out cells * o."""
    warehouse = Warehouse([KernelShape("small", (64, 64, 3, 3)), KernelShape("large", (256, 128, 3, 3))], KWConfig(n=n))
    o = warehouse.cells.shape[1]
    for share in warehouse.shares:
        own = warehouse.cells[share.start : share.start + share.owned]
        assert own.std().item() == pytest.approx(math.sqrt(2 / (share.owned * o)), rel=0.05)
        assert own.mean().item() == pytest.approx(0, abs=4 * own.std().item() / math.sqrt(own.numel()))
        cell_stds = own.flatten(1).std(1)
        assert cell_stds.min() > 0.7 * cell_stds.mean()


def test_reset_parameters_initializes_anew():
    warehouse = one_cell_per_position([4], 2)
    before = warehouse.cells.clone()
    warehouse.reset_parameters()
    assert not torch.any(warehouse.cells == before)


def test_repr_names_the_warehouse_its_budget_and_cells():
    warehouse = one_cell_per_position([24], Fraction(1, 2))
    assert repr(warehouse) == "Warehouse('house', n=1/2: 12 cells of 1 x 1 for 1 layers)"
