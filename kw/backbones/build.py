"""A backbone: a timm model, its scope (which layers share a warehouse) and its published settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import timm
import torch
from torch import nn

from kw.baselines.conversion import convert as convert_to_baseline
from kw.baselines.registry import BASELINES, check_settings, choices, startable
from kw.config import KW, SETTINGS, STATIC, BudgetLike, KWConfig, parse_budget
from kw.conversion import Scope, convert, convert_by_scope
from kw.from_static import load_static
from kw.replace import drop_unused_warehouses

FEATURE_OPTIONS: tuple[str, ...] = ("out_indices", "output_fmt", "norm")


@dataclass(frozen=True)
class Backbone:
    """How to build one timm model, vanilla or dynamic.

    Args:
        base: the vanilla model's name in timm.
        scope: from the budget to the scope to convert with. None: as `kw.plan` says, without `config`.
        config: from the budget and a warehouse's name to its settings, as published or extended to other budgets.
        vanilla: builds the vanilla model; `timm.create_model` unless the published rows differ from timm.
    """

    base: str
    scope: Callable[[Fraction], Scope] | None = None
    config: Callable[[Fraction, str], KWConfig] = lambda n, warehouse: KWConfig(n=n)
    vanilla: Callable[..., nn.Module] = timm.create_model

    def create(
        self,
        n: BudgetLike = 1,
        dynamic: str = KW,
        pretrained: bool = False,
        features_only: bool = False,
        from_weights: bool = False,
        **kwargs: Any,
    ) -> nn.Module:
        """Build the model.

        Args:
            n: the budget; "static" builds the vanilla model.
            dynamic: "kw", "static", or a method of `kw.baselines`, which then has n kernels in a layer.
            pretrained: load timm's static weights first; with `from_weights` they become the cells.
            from_weights: start from the static weights (`kw.convert`), pretrained ones or, for a test, random ones. Of
                the other methods only FDConv can (`kw.load_static`).
            features_only: return the feature maps, as timm does; `out_indices`, `output_fmt` and `norm` go with it.
            kwargs: fields of `KWConfig` override the settings of every warehouse, or are settings of the method
                (`attention_function`); the others are timm's.

        Raises:
            ValueError: n is not a budget, the kernels cannot be cut as the settings ask, there is no such method, or
                timm takes no features from this model.
            TypeError: timm's model does not accept a keyword.
            RuntimeError: `pretrained=True` for a published backbone: no weights are hosted.
        """
        if pretrained and self.scope is not None and not from_weights:
            raise RuntimeError(
                f"No pretrained weights are hosted for kw_{self.base}: create it with pretrained=False, "
                f"then kw.load_released(model, torch.load(file, weights_only=True)). To start from timm's static "
                f"weights, add from_weights=True."
            )
        if dynamic not in choices():
            raise ValueError(f"dynamic={dynamic!r} is not a known method; there are {', '.join(choices())}.")
        own = tuple(BASELINES[dynamic].settings) if dynamic in BASELINES else ()
        dynamic = STATIC if n == STATIC else dynamic
        settings = {key: kwargs.pop(key) for key in (*SETTINGS, *own) if key in kwargs}
        if settings and dynamic == STATIC:
            raise ValueError(
                f"{', '.join(settings)} does not apply to {dynamic!r}: a static model has no such setting."
            )
        if dynamic not in (KW, STATIC):
            check_settings(dynamic, settings)
        if from_weights and dynamic not in startable():
            raise ValueError(f"from_weights=True applies to dynamic={', '.join(startable())}, not to {dynamic!r}.")
        features = {key: kwargs.pop(key) for key in FEATURE_OPTIONS if features_only and key in kwargs}
        try:
            model = self.vanilla(self.base, pretrained=pretrained, **kwargs)
        except TypeError as error:
            whose, known = {KW: ("its warehouses", SETTINGS)}.get(dynamic, (dynamic, own))
            more = f" Settings of {whose} are {', '.join(known)}." if known and dynamic != STATIC else ""
            raise TypeError(f"{self.base}: {error}.{more}") from error
        model.kw_args = {**kwargs}  # type: ignore[assignment]  # kw/description.py reads them
        if dynamic == KW:
            self._convert(model, parse_budget(n), settings, from_weights)
        elif dynamic != STATIC:
            static = model.state_dict()
            convert_to_baseline(model, dynamic, n, **settings)
            if from_weights:
                load_static(model, static)
        return self.features_of(model, features) if features_only else model

    def _convert(self, model: nn.Module, n: Fraction, settings: dict[str, Any], from_weights: bool) -> None:
        if self.scope is None:
            convert(model, config=KWConfig(n=n, **settings), from_weights=from_weights)
        else:
            convert_by_scope(
                model, self.scope(n), lambda warehouse: self.config(n, warehouse).replace(**settings), from_weights
            )

    def features_of(self, model: nn.Module, options: dict[str, Any]) -> nn.Module:
        """The model in timm's FeatureGetterNet. FeatureListNet, timm's default for most models, would take layers out
        of the model and leave the warehouses behind."""
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"timm takes no features from {self.base}, which has no forward_intermediates.")
        with torch.device("meta"):  # timm's own features, without memory or time for weights
            timms: Any = timm.create_model(self.base, features_only=True, feature_cls="getter")
        getter = type(timms)  # timm does not export the class
        net: nn.Module = getter(model, **{"out_indices": timms.out_indices, **options})
        drop_unused_warehouses(model)
        return net
