"""ConvNeXt-Tiny: everything but the classifier, with LayerNorm in the attention."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from timm.models import register_model
from torch import nn

from kw.backbones.build import Backbone
from kw.config import KWConfig


def scope(name: str, layer: nn.Module) -> str | None:
    """Warehouses `stem`, `downsample{s}`, and per stage `stage{s}_depthwise` and `stage{s}_pointwise`."""
    if not isinstance(layer, (nn.Conv2d, nn.Linear)) or name.startswith("head"):
        return None
    if name.startswith("stem."):
        return "stem"
    match = re.match(r"stages\.(\d+)\.(downsample|blocks)", name)
    if match is None:
        return None
    stage, part = match.groups()
    if part == "downsample":
        return f"downsample{stage}"
    return f"stage{stage}_{'depthwise' if name.endswith('conv_dw') else 'pointwise'}"


def config(n: Fraction, warehouse: str) -> KWConfig:
    """Published at n = 1. Below, depthwise layers stay at n = 1, as in the published MobileNetV2 rows: their kernels
    have few parameters, and cells small enough to save some would need attentions many times that size."""
    if n < 1 and warehouse.endswith("depthwise"):
        return KWConfig(n=1, attention_norm="layer")
    return KWConfig(n=n, attention_norm="layer")


CONVNEXT_TINY = Backbone("convnext_tiny", lambda n: scope, config)


@register_model
def kw_convnext_tiny(**kwargs: Any) -> nn.Module:
    return CONVNEXT_TINY.create(**kwargs)
