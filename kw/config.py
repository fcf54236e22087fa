"""The settings of one warehouse: the budget n, how cells are cut, and the attention that mixes them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any

BudgetLike = str | int | float | Fraction

# Switches of the paper's ablations, each with its values; the first is the published one.
CHOICES = {
    "attention_norm": ("batch", "layer"),
    "attention_function": ("caf", "contrast", "softmax", "sigmoid", "tanh"),
    "anchoring": ("one_to_one", "all_to_one", "random", "none"),
    "sharing": ("stage", "none", "kind", "model"),
    "partition": ("spatial_channel", "channel", "none"),
}

BUDGET_HELP = "n is a whole number of at least 1 (1, 2, 4) or one over a whole number ('1/4', 0.25)"


def parse_budget(n: BudgetLike) -> Fraction:
    """The budget n as an exact fraction: `parse_budget("1/4") == parse_budget(0.25) == Fraction(1, 4)`.

    n is the number of kernel cells in a warehouse over the number of mixtures drawn from it (paper, section 3.1).
    Anchoring (paper, section 3.3) gives every cell to one mixture at first, so n or 1/n must be whole.

    Raises:
        ValueError: n is not a number, not positive, or has no anchoring rule (3/2, 2/3).
    """
    value = _exact(n)
    if value is None:
        raise ValueError(f"n={n!r} is not a budget: {BUDGET_HELP}.")
    if value <= 0:
        raise ValueError(f"n={n!r} is not positive: {BUDGET_HELP}.")
    if value.numerator != 1 and value.denominator != 1:
        whole = max(1, round(value)) if value > 1 else Fraction(1, round(1 / value))
        raise ValueError(
            f"n={n!r} is {value}, and the method defines no anchoring of cells for it: {BUDGET_HELP}. "
            f"The nearest is n={whole}."
        )
    return value


def format_budget(n: BudgetLike) -> str:
    """The budget as published rows spell it: `format_budget(0.25) == "1d4x"`, `format_budget(4) == "4x"`."""
    return str(parse_budget(n)).replace("/", "d") + "x"


@dataclass(frozen=True)
class KWConfig:
    """Settings of a warehouse and of the layers that draw from it.

    Args:
        n: budget, cells per mixture: `"1/4"`, `0.25`, `4`; stored as a `Fraction`.
        reduction: width of the attention's hidden layer over the layer's input channels (never under 16 wide).
        cell_in: input channels of a cell over the greatest common divisor of the layers' input channels, in (0, 1].
        cell_out: likewise for output channels. Left out, both follow from n as in the published rows.
        nonlocal_basis: under 1, cells that are not the layer's own are scored through a basis of
            this fraction of their number (ResNet50 at n = 1/2).
        attention_norm: normalization in the attention, `"batch"` or `"layer"`.
        attention_function: from scores to attentions (`kw.attention.FUNCTIONS`): `"caf"`, the published one;
            `"contrast"`, the same without anchors, whatever the temperature; `"softmax"`, `"sigmoid"` or `"tanh"`.
        anchoring: the cell that a mixture equals at temperature 1 (`kw.anchoring`): one each, `"one_to_one"`; the
            warehouse's first, `"all_to_one"`; one drawn by lot, `"random"`; or none, `"none"`: as at temperature 0.
        sharing: which layers share (`kw.sharing`): those of the scope's warehouse, `"stage"`; of those the ones of a
            kind, `"kind"`; each layer alone, `"none"`; or those of all warehouses with layers of a kind, `"model"`.
        partition: what a cell is: one position of some channels, `"spatial_channel"`; all positions of some channels,
            `"channel"`; a whole kernel, `"none"`, which leaves nothing for `cell_in` and `cell_out` to cut.

    The paper's ablations are the last four, `reduction`, and how long the temperature is warmed up.

    Raises:
        ValueError: a value is out of its range; the message names the key.
    """

    n: Any = Fraction(1)
    reduction: Any = Fraction(1, 16)
    cell_in: Any = None
    cell_out: Any = None
    nonlocal_basis: Any = Fraction(1)
    attention_norm: str = "batch"
    attention_function: str = "caf"
    anchoring: str = "one_to_one"
    sharing: str = "stage"
    partition: str = "spatial_channel"

    def __post_init__(self) -> None:
        for key, values in CHOICES.items():
            if getattr(self, key) not in values:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} must be {', '.join(map(repr, values[:-1]))} or {values[-1]!r}."
                )
        n = parse_budget(self.n)
        sides = (1, 1) if self.partition == "none" else cell_sides(n)
        self._set("n", n)
        self._set("cell_in", sides[0] if self.cell_in is None else self.cell_in)
        self._set("cell_out", sides[1] if self.cell_out is None else self.cell_out)
        for key in ("reduction", "cell_in", "cell_out", "nonlocal_basis"):
            value = _exact(getattr(self, key))
            if value is None or not 0 < value <= 1:
                raise ValueError(f"{key}={getattr(self, key)!r} must be a number above 0 and at most 1, such as 1/16.")
            self._set(key, value)
            if self.partition == "none" and key.startswith("cell") and value != 1:
                raise ValueError(f"{key}={value} cuts kernels, which partition='none' leaves whole: leave it out.")

    @property
    def is_anchored(self) -> bool:
        """Whether the temperature does anything."""
        return self.attention_function != "contrast" and self.anchoring != "none"

    def _set(self, key: str, value: object) -> None:
        object.__setattr__(self, key, value)  # the dataclass is frozen for everybody else

    def replace(self, **changes: Any) -> KWConfig:
        """A copy with other values; an unknown key is an error that lists the known ones. Where the partition becomes
        "none", cells become whole kernels, and stay so until they are given other sides."""
        known = [field.name for field in dataclasses.fields(self)]
        for key in changes:
            if key not in known:
                raise TypeError(f"KWConfig has no setting {key!r}; it has {', '.join(known)}.")
        if changes.get("partition") == "none":
            changes = {"cell_in": 1, "cell_out": 1, **changes}
        return dataclasses.replace(self, **changes)


def cell_sides(n: Fraction) -> tuple[Fraction, Fraction]:
    """`(cell_in, cell_out)` that go with a budget.

    Whole at n >= 1 and one half each at 1/2 and 1/4, as published. Below, the sides go on being halved, output first,
    until a whole cell makes at least 1/n cut ones: only then can a layer of few mixtures be given its share of cells.
    """
    if n >= 1:
        return Fraction(1), Fraction(1)
    cell_in = cell_out = Fraction(1, 2)
    while cell_in * cell_out > n:
        cell_in, cell_out = (cell_in, cell_out / 2) if cell_out >= cell_in else (cell_in / 2, cell_out)
    return cell_in, cell_out


def _exact(value: object) -> Fraction | None:
    """`value` as a fraction, 0.025 as 1/40 and 1/3 in floating point as 1/3; None where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        return None
    try:
        exact = Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        return None
    near = exact.limit_denominator(1 << 16)
    return near if isinstance(value, float) and math.isclose(near, exact, rel_tol=1e-12) else exact
