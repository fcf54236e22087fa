"""`create_model`: any timm model, static, with KernelWarehouse, or with a method to compare with."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn

from kw.backbones import BACKBONES, Backbone
from kw.config import KW, BudgetLike


def create_model(name: str, n: BudgetLike = 1, dynamic: str = KW, **kwargs: Any) -> nn.Module:
    """Build a timm model and make its layers dynamic.

    Args:
        name: of a timm model, such as "resnet18" or "regnety_002". Those in `kw.backbones` get the warehouses of the
            paper (arXiv 2406.07879, section 4 and appendix), all others those of `kw.plan`.
        n: the budget, such as "1/4" or 4; "static" leaves the model as timm builds it.
        dynamic: "kw", "static", or a method of `kw.baselines`, which then has n kernels in a layer.
        kwargs: those of `Backbone.create`: fields of `KWConfig` or settings of the method, `features_only`, and
            arguments of timm's.

    Raises:
        ValueError: there is no such model, method or budget, or the kernels cannot be cut as the settings ask.
        TypeError: timm's model does not accept a keyword.
    """
    name = name.removeprefix("kw_")
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3)) or "none"
        raise ValueError(f"timm has no model {name!r}; similar names: {near}.")
    return BACKBONES.get(name, Backbone(name)).create(n=n, dynamic=dynamic, **kwargs)
