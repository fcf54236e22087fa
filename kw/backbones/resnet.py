"""ResNet18 and ResNet50: a warehouse per stage, 3x3 and 1x1 convolutions together; stem and classifier static."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import timm
from timm.layers.drop import DropPath
from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from kw.backbones.build import Backbone
from kw.config import KWConfig


def scope(name: str, layer: nn.Module) -> str | None:
    """Convolutions of stage s share warehouse `stage{s}`. The first and the downsample convolution of a stage's first
    block are in the warehouse of the stage before, whose number of channels their input still has.

    Stage 0 has no stage before: there, a pointwise one (ResNet50's) stays static.
    """
    match = re.match(r"layer(\d+)\.(\d+)\.(.+)", name)
    if match is None or not isinstance(layer, nn.Conv2d):
        return None
    stage, block, child = int(match[1]) - 1, int(match[2]), match[3]
    if block == 0 and (child == "conv1" or child.startswith("downsample.")):
        if stage > 0:
            stage -= 1
        elif layer.kernel_size == (1, 1):
            return None
    return f"stage{stage}"


def resnet18_config(n: Fraction, warehouse: str) -> KWConfig:
    return KWConfig(n=n)


def resnet50_config(n: Fraction, warehouse: str) -> KWConfig:
    """Below n = 1 (published: 1/2), hundreds of small cells get their scores through a basis, which keeps the
    attentions small."""
    return KWConfig(n=n, nonlocal_basis=Fraction(1, 16) if n < 1 else 1)


def vanilla(
    name: str,
    drop_path_rate: float = 0.0,
    zero_init_last: bool = False,
    stem_stride: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's ResNet as the published rows train it: the drop path rate is the same in all blocks (timm's grows with
    depth), and the last norm of a block does not start at zero, so that every cell gets a gradient from the first step.

    With `stem_stride`, for small images, the stem is one 3x3 convolution of that stride. timm's is a 7x7 one of stride
    2 and a pooling, which reduce 32 pixels to 8.
    """
    model = timm.create_model(name, zero_init_last=zero_init_last, **kwargs)
    if stem_stride is not None:
        _set_small_stem(model, stem_stride)
    if drop_path_rate > 0:
        for module in model.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                module.drop_path = DropPath(drop_path_rate)
    return model


def _set_small_stem(model: Any, stride: int) -> None:
    old = model.conv1
    if not isinstance(stride, int) or isinstance(stride, bool) or stride < 1:
        raise ValueError(f"stem_stride={stride!r} must be an integer of at least 1, or None for timm's stem.")
    if not isinstance(old, nn.Conv2d):
        raise ValueError(f"stem_stride={stride} is for a stem of one convolution; this one has several.")
    device, dtype = old.weight.device, old.weight.dtype
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, stride, 1, bias=False, device=device, dtype=dtype)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's
    model.maxpool = nn.Identity()
    for info in model.feature_info:
        info["reduction"] = stride if info["module"] == "act1" else info["reduction"] * stride // 4


RESNET18 = Backbone("resnet18", lambda n: scope, resnet18_config, vanilla)
RESNET50 = Backbone("resnet50", lambda n: scope, resnet50_config, vanilla)


@register_model
def kw_resnet18(**kwargs: Any) -> nn.Module:
    return RESNET18.create(**kwargs)


@register_model
def kw_resnet50(**kwargs: Any) -> nn.Module:
    return RESNET50.create(**kwargs)
