"""How far `kw.plan` keeps its promises, over models of timm: one of each family, at several budgets.

    python -m scripts.plan_survey                 a table, and the models that miss a promise; two minutes
    python -m scripts.plan_survey models=20       the first twenty

Families are by the first word of a model's name, without trailing digits. Of each, the first model in timm's order is
taken that has at most 60 million parameters and no name of a large size. S: parameters of the static model. W: weights
of all plain convolutions and linear layers but the first and the classifier.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import timm
import torch
from torch import nn

import kw
from kw.planning import Plan, plan_layers
from kw.replace import PLAIN
from kw.scope import classifiers, layers_of
from kw.table import table
from scripts.options import one_line_errors, parse

BUDGETS = [Fraction(n) for n in ("1/8", "1/4", "1/2", "1", "2", "4")]
LARGEST = 60_000_000
LARGE = ("base", "large", "huge", "giant", "gigantic", "enormous", "xl", "so400", "so150", "_1b", "_3b", "384", "512")


@dataclass
class Options:
    models: int = 1000


def families(limit: int) -> Iterator[tuple[str, nn.Module]]:
    """A small model of each family, on the meta device."""
    names: dict[str, list[str]] = {}
    for name in timm.list_models(exclude_filters=["kw_*", "kernelwarehouse", *(f"*{size}*" for size in LARGE)]):
        names.setdefault(re.sub(r"\d+\w?$", "", name.split("_")[0]), []).append(name)
    found = 0
    for members in names.values():
        if found == limit:
            return
        for name in members[:3]:
            with torch.device("meta"):
                model = timm.create_model(name)
            if sum(parameter.numel() for parameter in model.parameters()) <= LARGEST:
                found += 1
                yield name, model
                break


def plain_weights(model: nn.Module) -> int:
    """W."""
    plain = [(name, module) for name, module in model.named_modules() if type(module) in PLAIN]
    heads = classifiers(model, [name for name, _ in plain])
    return sum(module.weight.numel() for name, module in plain[1:] if name not in heads)


def kept(plan: Plan, asked: int) -> bool:
    """Never more than S below n = 1, at most 1.15 S at n = 1, and at most S + 1.15 (n - 1) W above."""
    added = plan.params - plan.static_params
    if plan.n > 1:
        return added <= Fraction(115, 100) * (plan.n - 1) * asked
    return added <= (Fraction(15, 100) * plan.static_params if plan.n == 1 else 0)


def reached(plan: Plan, asked: int) -> bool:
    """Half of (1 - n) W saved below n = 1, half of W dynamic at n = 1, a third of (n - 1) W added above."""
    added = plan.params - plan.static_params
    if plan.n == 1:
        return sum(warehouse.kernels for warehouse in plan.warehouses) >= Fraction(asked, 2)
    return added >= (plan.n - 1) * asked / 3 if plan.n > 1 else -added >= (1 - plan.n) * asked / 2


def main(words: list[str]) -> None:
    with one_line_errors():
        options, rest = parse(Options, words, __doc__)
        if rest:
            raise SystemExit(f"{rest[0]!r} is no option: python -m scripts.plan_survey models=20")
    missed: dict[Fraction, list[str]] = {n: [] for n in BUDGETS}
    short: dict[Fraction, list[str]] = {n: [] for n in BUDGETS}
    number = 0
    for name, model in families(options.models):
        number += 1
        layers, asked = layers_of(model), plain_weights(model)
        params = sum(parameter.numel() for parameter in model.parameters())
        for n in BUDGETS:
            plan = plan_layers(layers, kw.KWConfig(n=n), name, params)
            missed[n] += [] if kept(plan, asked) else [name]
            short[n] += [] if reached(plan, asked) else [name]
    print(f"{number} models of timm {timm.__version__}")
    rows = [(n, number - len(missed[n]), number - len(short[n]), " ".join(missed[n] + short[n])) for n in BUDGETS]
    print(table(("n", "promise kept", "reached", "by all but"), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
