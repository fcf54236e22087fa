"""One way to build a model: any timm model, static, with KernelWarehouse, or with a method to compare with."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn

from kw.backbones import BACKBONES
from kw.backbones.build import SETTINGS
from kw.baselines.conversion import convert as convert_to_baseline
from kw.baselines.registry import KW, STATIC, choices
from kw.config import BudgetLike, KWConfig
from kw.conversion import convert


def create_model(name: str, n: BudgetLike = 1, dynamic: str = KW, **kwargs: Any) -> nn.Module:
    """Build a timm model and make its layers dynamic.

    Args:
        name: of a timm model, such as "resnet18" or "regnety_002". Those in `kw.backbones` get the warehouses of the
            paper (arXiv 2406.07879, section 4 and appendix), all others those of `kw.default_scope`.
        n: the budget, such as "1/4" or 4; "static" leaves the model as timm builds it.
        dynamic: "kw", "static", or a method of `kw.baselines`, which then has n kernels in a layer.
        kwargs: fields of `KWConfig` override the published settings; the rest goes to `timm.create_model`.

    Raises:
        ValueError: there is no such model, method or budget, or the kernels cannot be cut as the settings ask.
        TypeError: timm's model does not take a keyword.
    """
    name = name.removeprefix("kw_")
    if name in BACKBONES:
        return BACKBONES[name].create(n=n, dynamic=dynamic, **kwargs)
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3)) or "none"
        raise ValueError(f"timm has no model {name!r}; near are {near}.")
    if dynamic not in choices():
        raise ValueError(f"dynamic={dynamic!r}: there is no such method; there are {', '.join(choices())}.")
    dynamic = STATIC if n == STATIC else dynamic
    settings = {key: kwargs.pop(key) for key in SETTINGS if key in kwargs}
    if settings and dynamic != KW:
        raise ValueError(f"{', '.join(settings)}: settings of warehouses, which {dynamic!r} has none of.")
    model: nn.Module = timm.create_model(name, **kwargs)
    if dynamic == KW:
        return convert(model, config=KWConfig(n=n, **settings))
    return model if dynamic == STATIC else convert_to_baseline(model, dynamic, n)
