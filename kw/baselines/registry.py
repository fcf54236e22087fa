"""The methods by name. A new file in this folder adds one, and no other file changes:

@register("mine", budget=True)
class MyConv2d(KernelBank): ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from kw.baselines.layer import DynamicConv2d
from kw.config import KW, SETTINGS, STATIC, BudgetLike, parse_budget


@dataclass(frozen=True)
class Baseline:
    """A method. Its layer accepts the arguments of `nn.Conv2d`, if it has a `budget` the keyword `n`, and its
    `settings`: keywords with the values that they may have, the usual one first. It keeps n and each setting as an
    attribute of that name, from which `kw.save` describes it."""

    name: str
    layer: type[Any]
    budget: bool
    settings: Mapping[str, tuple[str, ...]]

    @property
    def takes_static(self) -> bool:
        """Whether its layers can begin from a static kernel: they have `set_kernel(kernel)` then (`kw.load_static`)."""
        return self.layer.set_kernel is not None


BASELINES: dict[str, Baseline] = {}
# Arguments of kw.create_model and kw.baselines.convert, which settings are passed along with.
TAKEN = ("name", "n", "dynamic", "pretrained", "features_only", "from_weights", "model", "scope")


def register(
    name: str, *, budget: bool, settings: Mapping[str, tuple[str, ...]] = MappingProxyType({})
) -> Callable[[type[Any]], type[Any]]:
    """Register a `kw.baselines.DynamicConv2d` as the method `name`.

    Args:
        name: lower case letters only, because names of run folders and reports contain it, followed by n.
        budget: whether layers have a number of kernels n to choose.
        settings: further keywords of the layer, with the values that they may have.

    Raises:
        ValueError: the name is taken, or not of lower case letters; or a setting has the name of an argument of
            `kw.create_model` or `kw.baselines.convert`.
        TypeError: the layer is no `DynamicConv2d`, or lacks `forward`: it would be a static convolution, unnoticed.
    """
    if not re.fullmatch("[a-z]+", name):
        raise ValueError(f"A method cannot be called {name!r}: use lower case letters only.")
    if name in choices():
        by = f", by {BASELINES[name].layer.__module__}" if name in BASELINES else ""
        raise ValueError(f"A method cannot be called {name!r}: that name is taken{by}.")

    for setting in settings:
        if setting in TAKEN:
            raise ValueError(f"{name}: a setting cannot be called {setting!r}, as kw.create_model has that argument.")

    def add(layer: type[Any]) -> type[Any]:
        if not (isinstance(layer, type) and issubclass(layer, DynamicConv2d)):
            raise TypeError(
                f"The layer of the method {name!r} must be a class that inherits kw.baselines.DynamicConv2d."
            )
        if layer.forward is nn.Conv2d.forward:
            raise TypeError(f"{layer.__name__}, the layer of the method {name!r}, needs a forward of its own.")
        BASELINES[name] = Baseline(name, layer, budget, settings)
        return layer

    return add


def choices() -> tuple[str, ...]:
    """All values of `dynamic`."""
    return (KW, STATIC, *sorted(BASELINES))


def startable() -> tuple[str, ...]:
    """The values of `dynamic` that can start from static weights."""
    return (KW, STATIC, *(name for name, method in sorted(BASELINES.items()) if method.takes_static))


def find(name: str) -> Baseline:
    """The method of this name. Raises ValueError, with the known names, if there is none."""
    if name not in BASELINES:
        raise ValueError(f"{name!r} is not a method of kw.baselines; those are {', '.join(sorted(BASELINES))}.")
    return BASELINES[name]


def check_budget(name: str, n: BudgetLike) -> int:
    """The number of kernels in a layer of method `name`: n, or 1 if the method has no budget.

    Raises:
        ValueError: there is no such method, or n is not an integer.
    """
    if not find(name).budget:
        return 1
    budget = parse_budget(n)
    if budget.denominator != 1:
        raise ValueError(
            f"n={n!r} is not a number of kernels for dynamic={name!r}: it must be an integer, such as 1 or 4."
        )
    return int(budget)


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raises ValueError: the method has no such setting, or not with this value."""
    known = find(name).settings
    for key, value in settings.items():
        if key not in known:
            if key in SETTINGS:
                others = [KW, *(other for other, method in sorted(BASELINES.items()) if key in method.settings)]
                raise ValueError(f"{key} does not apply to dynamic={name!r}, but to {', '.join(others)}.")
            has = f"its settings are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"dynamic={name!r} has no setting {key!r}: {has}.")
        if value not in known[key]:
            raise ValueError(f"{key}={value!r} is not for dynamic={name!r}: it can be {', '.join(known[key])}.")
