"""MobileNetV2 at widths 1.0 and 0.5: per stage a warehouse for depthwise and one or two for pointwise convolutions."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from timm.models import register_model
from torch import nn

from kw.backbones.build import Backbone
from kw.config import KWConfig
from kw.conversion import Scope

# The warehouse stage of each of timm's seven groups of inverted residuals; the last two groups share one.
STAGES = (1, 2, 3, 4, 5, 6, 6)
LAST = STAGES[-1]

EXPANSION, DEPTHWISE, PROJECTION = "expansion", "depthwise", "projection"
ROLES = {"conv_pw": EXPANSION, "conv_dw": DEPTHWISE, "conv_pwl": PROJECTION}


def scope_for(n: Fraction) -> Scope:
    """The published scopes: that of n = 1; that of n = 4, for all n above 1; and that of n = 1/2, for all below 1."""
    if n == 1:
        return lambda name, layer: _merge_pointwise(_place(name, layer))
    if n > 1:
        return lambda name, layer: _place(name, layer)
    return lambda name, layer: _small(name, layer)


def _place(name: str, layer: nn.Module) -> str | None:
    """`stem`, or `stage{s}_{role}`. All layers of a new stage's first block are in the stage before."""
    if name == "conv_stem":
        return "stem"
    if name == "conv_head":
        return f"stage{LAST}_{PROJECTION}"
    match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(conv_\w+)", name)
    if match is None:
        return None
    group, block, child = int(match[1]), int(match[2]), match[3]
    first_of_stage = block == 0 and group > 0 and STAGES[group] != STAGES[group - 1]
    stage = STAGES[group] - first_of_stage
    # The first group has no expansion: timm calls its projection conv_pw.
    role = PROJECTION if group == 0 and child == "conv_pw" else ROLES[child]
    return f"stage{stage}_{role}"


def _merge_pointwise(warehouse: str | None) -> str | None:
    return warehouse and re.sub(f"{EXPANSION}|{PROJECTION}", "pointwise", warehouse)


def _small(name: str, layer: nn.Module) -> str | None:
    """Below n = 1, only these are dynamic: stem, depthwise, pointwise of the last stage, and the classifier."""
    if name == "classifier":
        return "classifier" if isinstance(layer, nn.Linear) else None
    warehouse = _place(name, layer)
    if warehouse and warehouse.endswith((EXPANSION, PROJECTION)) and not warehouse.startswith(f"stage{LAST}"):
        return None
    return warehouse


def config(n: Fraction, warehouse: str) -> KWConfig:
    """One budget for all from n = 1 on; below, it only applies to pointwise convolutions and the classifier."""
    if n >= 1:
        return KWConfig(n=n)
    if warehouse == "stem" or warehouse.endswith(DEPTHWISE):
        return KWConfig(n=1, reduction=Fraction(1, 32))
    if warehouse == "classifier":
        return KWConfig(n=n, reduction=Fraction(1, 32), cell_in=Fraction(1, 40), cell_out=1)
    return KWConfig(n=n, reduction=Fraction(1, 32))


MOBILENETV2_100 = Backbone("mobilenetv2_100", scope_for, config)
MOBILENETV2_050 = Backbone("mobilenetv2_050", scope_for, config)


@register_model
def kw_mobilenetv2_100(**kwargs: Any) -> nn.Module:
    return MOBILENETV2_100.create(**kwargs)


@register_model
def kw_mobilenetv2_050(**kwargs: Any) -> nn.Module:
    return MOBILENETV2_050.create(**kwargs)
