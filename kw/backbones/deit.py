"""DeiT-Tiny and -Small. The warehouses are our choice: no code was released with the paper's DeiT row.

The linear layers qkv, proj, fc1 and fc2 are dynamic; patch embedding and head are static. The twelve blocks form three
stages of four. Each stage has one warehouse for the layers of self-attention and one for those of the MLP. The
attention over cells uses LayerNorm.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from timm.models import register_model
from torch import nn

from kw.backbones.build import Backbone
from kw.config import KWConfig

BLOCKS_PER_STAGE = 4


def scope(name: str, layer: nn.Module) -> str | None:
    """Warehouses `stage{s}_attn` for {qkv, proj} and `stage{s}_mlp` for {fc1, fc2}."""
    match = re.fullmatch(r"blocks\.(\d+)\.(attn\.(?:qkv|proj)|mlp\.(?:fc1|fc2))", name)
    if match is None:
        return None
    return f"stage{int(match[1]) // BLOCKS_PER_STAGE}_{match[2].partition('.')[0]}"


def config(n: Fraction, warehouse: str) -> KWConfig:
    return KWConfig(n=n, attention_norm="layer")


DEIT_TINY = Backbone("deit_tiny_patch16_224", lambda n: scope, config)
DEIT_SMALL = Backbone("deit_small_patch16_224", lambda n: scope, config)


@register_model
def kw_deit_tiny_patch16_224(**kwargs: Any) -> nn.Module:
    return DEIT_TINY.create(**kwargs)


@register_model
def kw_deit_small_patch16_224(**kwargs: Any) -> nn.Module:
    return DEIT_SMALL.create(**kwargs)
