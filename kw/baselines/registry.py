"""The methods by name. A file of this folder adds one, without a change to any other:

@register("mine", budget=True)
class MyConv2d(KernelBank): ...
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kw.config import BudgetLike, parse_budget

KW, STATIC = "kw", "static"  # what `dynamic` says of KernelWarehouse and of the vanilla model


@dataclass(frozen=True)
class Baseline:
    """A method: its layer takes the arguments of `nn.Conv2d` and, if it has a `budget`, the keyword `n`."""

    name: str
    layer: type[Any]
    budget: bool


BASELINES: dict[str, Baseline] = {}


def register(name: str, *, budget: bool) -> Callable[[type[Any]], type[Any]]:
    """Register a `kw.baselines.DynamicConv2d` as the method `name`.

    Args:
        name: run folders and reports have it in their names, and n after it: lower case letters alone.
        budget: whether there is a number n of kernels to choose. If not, the layer is not given any.

    Raises:
        ValueError: there is such a method, or the name cannot be one.
    """
    if name in (KW, STATIC, *BASELINES) or not re.fullmatch("[a-z]+", name):
        raise ValueError(
            f"A baseline cannot be called {name!r}: lower case letters, and not one of {', '.join(choices())}."
        )

    def add(layer: type[Any]) -> type[Any]:
        BASELINES[name] = Baseline(name, layer, budget)
        return layer

    return add


def choices() -> tuple[str, ...]:
    """All that `dynamic` can say."""
    return (KW, STATIC, *sorted(BASELINES))


def find(name: str) -> Baseline:
    """Raises ValueError, with the names there are, if there is no such method."""
    if name not in BASELINES:
        raise ValueError(f"{name!r} is no method of kw.baselines; those are {', '.join(sorted(BASELINES))}.")
    return BASELINES[name]


def check_budget(name: str, n: BudgetLike) -> int:
    """The number of kernels of a layer of method `name`: n, or 1 if the method leaves no choice.

    Raises:
        ValueError: there is no such method, or n is no whole number.
    """
    if not find(name).budget:
        return 1
    budget = parse_budget(n)
    if budget.denominator != 1:
        raise ValueError(f"n={n!r} is no number of kernels for dynamic={name!r}: it must be whole, such as 1 or 4.")
    return int(budget)
