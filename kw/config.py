"""The settings of one warehouse: the budget n, how cells are cut, and the attention that mixes them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

Number = str | int | float | Fraction  # as a user writes it: "1/4", 4, 0.25
BudgetLike = Number

# Values of `dynamic` for KernelWarehouse and for the vanilla model, besides the methods of kw.baselines. "static" is
# also accepted in place of a budget.
KW, STATIC = "kw", "static"

# Switches of the paper's ablations, each with its values; the first is the published one.
CHOICES = {
    "attention_norm": ("batch", "layer"),
    "attention_function": ("caf", "contrast", "softmax", "sigmoid", "tanh"),
    "anchoring": ("one_to_one", "all_to_one", "random", "none"),
    "sharing": ("stage", "none", "kind", "model"),
    "partition": ("spatial_channel", "channel", "none"),
}

BUDGET_HELP = "n is an integer of at least 1 (1, 2, 4) or one over an integer ('1/4', 0.25)"


def parse_budget(n: BudgetLike) -> Fraction:
    """The budget n as an exact fraction: `parse_budget("1/4") == parse_budget(0.25) == Fraction(1, 4)`.

    n is the number of kernel cells in a warehouse over the number of mixtures of its layers (paper, section 3.1).
    Anchoring (paper, section 3.3) first assigns every cell to one mixture, so n or 1/n must be an integer.

    Raises:
        ValueError: n is not a number, not positive, or has no anchoring rule (3/2, 2/3).
    """
    value = _exact(n)
    if value is None:
        raise ValueError(f"n={n!r} is not a budget: {BUDGET_HELP}.")
    if value <= 0:
        raise ValueError(f"n={n!r} is not positive: {BUDGET_HELP}.")
    if value.numerator != 1 and value.denominator != 1:
        nearest = max(1, round(value)) if value > 1 else Fraction(1, round(1 / value))
        raise ValueError(
            f"n={n!r} is {value}, and the method defines no anchoring of cells for it: {BUDGET_HELP}. "
            f"The nearest is n={nearest}."
        )
    return value


def format_budget(n: BudgetLike) -> str:
    """The budget as published rows spell it: `format_budget(0.25) == "1d4x"`, `format_budget(4) == "4x"`."""
    return str(parse_budget(n)).replace("/", "d") + "x"


@dataclass(frozen=True)
class _Settings:
    """The fields of `KWConfig`."""

    n: Fraction
    reduction: Fraction
    cell_in: Fraction
    cell_out: Fraction
    nonlocal_basis: Fraction
    attention_norm: str
    attention_function: str
    anchoring: str
    sharing: str
    partition: str


@dataclass(frozen=True, init=False)
class KWConfig(_Settings):
    """Settings of a warehouse and of the layers that share it. Immutable, and compared by value.

    Args:
        n: budget, cells per mixture: `"1/4"`, `0.25`, `4`. It and the next four are stored as `Fraction`.
        reduction: width of the attention's hidden layer over the layer's input channels (never under 16 wide).
        cell_in: input channels of a cell over the greatest common divisor of the layers' input channels, in (0, 1].
        cell_out: the same for output channels. By default both follow from n as in the published rows.
        nonlocal_basis: below 1, cells that are not the layer's own get their scores through a basis of this fraction of
            their number (ResNet50 at n = 1/2).
        attention_norm: normalization in the attention, `"batch"` or `"layer"`.
        attention_function: from scores to attentions (`kw.attention.FUNCTIONS`): `"caf"`, the published one;
            `"contrast"`, the same without anchors at any temperature; `"softmax"`, `"sigmoid"` or `"tanh"`.
        anchoring: the cell that a mixture equals at temperature 1 (`kw.anchoring`): one each, `"one_to_one"`; the
            warehouse's first, `"all_to_one"`; a random one, `"random"`; or none, `"none"`: as at temperature 0.
        sharing: which layers share (`kw.sharing`): those of the scope's warehouse, `"stage"`; of those the ones of a
            kind, `"kind"`; each layer alone, `"none"`; or those of all warehouses with layers of a kind, `"model"`.
        partition: what a cell is: some channels at one position, `"spatial_channel"`; some channels at all positions,
            `"channel"`; or a complete kernel, `"none"`, which `cell_in` and `cell_out` cannot cut.

    The paper's ablations are the last four, `reduction`, and the length of the temperature's warm-up.

    Raises:
        ValueError: a value is out of its range; the message names the key.
    """

    def __init__(
        self,
        n: BudgetLike = 1,
        reduction: Number = Fraction(1, 16),
        cell_in: Number | None = None,
        cell_out: Number | None = None,
        nonlocal_basis: Number = 1,
        attention_norm: str = "batch",
        attention_function: str = "caf",
        anchoring: str = "one_to_one",
        sharing: str = "stage",
        partition: str = "spatial_channel",
    ):
        budget = parse_budget(n)
        sides = (Fraction(1), Fraction(1)) if partition == "none" else cell_sides(budget)
        super().__init__(
            n=budget,
            reduction=_parse_fraction("reduction", reduction),
            cell_in=sides[0] if cell_in is None else _parse_fraction("cell_in", cell_in),
            cell_out=sides[1] if cell_out is None else _parse_fraction("cell_out", cell_out),
            nonlocal_basis=_parse_fraction("nonlocal_basis", nonlocal_basis),
            attention_norm=attention_norm,
            attention_function=attention_function,
            anchoring=anchoring,
            sharing=sharing,
            partition=partition,
        )
        for key, values in CHOICES.items():
            if getattr(self, key) not in values:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} must be {', '.join(map(repr, values[:-1]))} or {values[-1]!r}."
                )
        for key, side in (("cell_in", self.cell_in), ("cell_out", self.cell_out)):
            if partition == "none" and side != 1:
                raise ValueError(f"{key}={side} cuts kernels, which partition='none' does not: leave it out.")

    @property
    def is_anchored(self) -> bool:
        """Whether mixtures have anchors, so that the temperature has an effect."""
        return self.attention_function != "contrast" and self.anchoring != "none"

    def replace(self, **changes: Number | None) -> KWConfig:
        """A copy with other values. Raises TypeError for an unknown key, with the known ones.

        With partition="none" in the changes, cells become complete kernels, and stay so until `cell_in` and `cell_out`
        change too.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for key in changes:
            if key not in known:
                raise TypeError(f"KWConfig has no setting {key!r}; it has {', '.join(known)}.")
        if changes.get("partition") == "none":
            changes = {"cell_in": 1, "cell_out": 1, **changes}
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


SETTINGS = tuple(field.name for field in dataclasses.fields(KWConfig) if field.name != "n")


def cell_sides(n: Fraction) -> tuple[Fraction, Fraction]:
    """`(cell_in, cell_out)` for a budget: 1 each at n >= 1, and 1/2 each at 1/2 and 1/4, as published.

    Below 1/4 the sides are halved further, output first, until an uncut cell makes at least 1/n cut ones. Only then can
    a layer of few mixtures get its part of the cells.
    """
    if n >= 1:
        return Fraction(1), Fraction(1)
    cell_in = cell_out = Fraction(1, 2)
    while cell_in * cell_out > n:
        cell_in, cell_out = (cell_in, cell_out / 2) if cell_out >= cell_in else (cell_in / 2, cell_out)
    return cell_in, cell_out


def _parse_fraction(key: str, value: Number) -> Fraction:
    exact = _exact(value)
    if exact is None or not 0 < exact <= 1:
        raise ValueError(f"{key}={value!r} must be a number above 0 and at most 1, such as 1/16.")
    return exact


def _exact(value: object) -> Fraction | None:
    """`value` as a fraction: 0.025 as 1/40, and 1/3 in floating point as 1/3. None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        return None
    try:
        exact = Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        return None
    near = exact.limit_denominator(1 << 16)
    return near if isinstance(value, float) and math.isclose(near, exact, rel_tol=1e-12) else exact
