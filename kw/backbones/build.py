"""A backbone of ours: a timm model, a scope (which layer draws from which warehouse) and its published settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import timm
from timm.models._features import FeatureGetterNet
from torch import nn

from kw.baselines.conversion import convert as convert_to_baseline
from kw.baselines.registry import KW, STATIC, choices
from kw.config import BudgetLike, KWConfig, parse_budget
from kw.conversion import Scope, convert
from kw.layers import drop_unused_warehouses

SETTINGS = tuple(field.name for field in dataclasses.fields(KWConfig) if field.name != "n")


@dataclass(frozen=True)
class Backbone:
    """How one timm model becomes a KernelWarehouse backbone.

    Args:
        base: the vanilla model's name in timm.
        scope: from the budget, the scope to convert with.
        config: from the budget and a warehouse's name, its settings as published, or extended to other budgets.
        vanilla: builds the vanilla model; `timm.create_model` unless the published rows differ from timm.
        out_indices: features that `features_only=True` gives by default, as timm does for the vanilla model.
    """

    base: str
    scope: Callable[[Fraction], Scope]
    config: Callable[[Fraction, str], KWConfig]
    vanilla: Callable[..., nn.Module] = timm.create_model
    out_indices: tuple[int, ...] = (0, 1, 2, 3, 4)

    def create(self, n: BudgetLike = 1, pretrained: bool = False, dynamic: str = KW, **kwargs: Any) -> nn.Module:
        """The backbone at budget `n`; at `n="static"` the vanilla model, built alike.

        `dynamic` names another method (`kw.baselines`) in place of KernelWarehouse, with n kernels a layer; "static" is
        the vanilla model, whatever n is. Settings of `KWConfig` among the keywords override the published ones in every
        warehouse; the other keywords are timm's, `features_only` and `out_indices` among them.

        Raises:
            ValueError: n is not a budget, the kernels cannot be cut as the settings ask, or there is no such method.
            RuntimeError: `pretrained=True`; no weights are hosted, so nothing could be loaded.
        """
        if pretrained:
            raise RuntimeError(
                f"No pretrained weights are hosted for kw_{self.base}: create it with pretrained=False, "
                f"then kw.load_released(model, torch.load(file, weights_only=True))."
            )
        if dynamic not in choices():
            raise ValueError(f"dynamic={dynamic!r}: there is no such method; there are {', '.join(choices())}.")
        dynamic = STATIC if n == STATIC else dynamic
        overrides = {key: kwargs.pop(key) for key in SETTINGS if key in kwargs}
        features = {key: kwargs.pop(key) for key in ("out_indices", "output_fmt", "norm") if key in kwargs}
        features_only = kwargs.pop("features_only", False)
        try:
            model = self.vanilla(self.base, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"kw_{self.base}: {error}. Settings of its warehouses are {', '.join(SETTINGS)}."
            ) from error
        if overrides and dynamic != KW:
            raise ValueError(f"{', '.join(overrides)}: settings of warehouses, which {dynamic!r} has none of.")
        if dynamic == KW:
            budget = parse_budget(n)
            convert(model, self.scope(budget), lambda warehouse: self.config(budget, warehouse).replace(**overrides))
        elif dynamic != STATIC:
            convert_to_baseline(model, dynamic, n)
        if not features_only:
            return model
        # timm's list wrapper takes a model apart, and would leave the warehouses behind; its getter keeps it whole.
        net = FeatureGetterNet(model, **{"out_indices": self.out_indices, **features})
        drop_unused_warehouses(model)
        return net
