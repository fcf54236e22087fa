"""The default scope: one warehouse per stage and kind of layer, for models that have no scope of their own."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def kind_of(layer: nn.Module) -> str:
    """`linear`, `pointwise`, `depthwise`, `grouped` or `conv`: layers of a kind have kernels that cut alike."""
    if isinstance(layer, nn.Linear):
        return "linear"
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if layer.groups > 1:
        return "depthwise" if layer.groups == layer.in_channels else "grouped"
    return "pointwise" if math.prod(layer.kernel_size) == 1 else "conv"


def default_scope(model: nn.Module) -> dict[str, str]:
    """Layer name -> warehouse name, `stage{s}_{kind}`, for every plain convolution and linear layer of `model` but

    - the first, which reads the image, and the classifier (`model.get_classifier()`, or else the last layer);
    - those of squeeze-and-excitation blocks (below a module named `se`), an attention of their own;
    - those inside `nn.MultiheadAttention`, which reads their weights itself.

    Stages are timm's: up to each module of `model.feature_info`, those of one resolution together. A model without
    it is cut by names: `layer1` and `blocks.3` are stages, up to the first number in a layer's name.
    """
    names = [name for name, module in model.named_modules() if type(module) in KINDS]
    hidden = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    static = {*names[:1], *_classifier(model, names)}
    stages = _stages(model, names)
    scope = {}
    for name in names:
        inside = any(name.startswith(f"{prefix}.") for prefix in hidden)
        if name in static or inside or "se" in name.split(".") or stages[name] is None:
            continue
        scope[name] = f"stage{stages[name]}_{kind_of(model.get_submodule(name))}"
    return scope


def _classifier(model: nn.Module, names: list[str]) -> set[str]:
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return set(names[-1:])
    head = get_classifier()
    heads = set(head) if isinstance(head, (tuple, list)) else {head}
    return {name for name, module in model.named_modules() if module in heads}


def _stages(model: nn.Module, names: list[str]) -> dict[str, int | None]:
    """Stage of each layer; None for what comes after the last."""
    info: Any = getattr(model, "feature_info", None)
    if not info:
        prefixes = [_up_to_number(name) for name in names]
        order = {prefix: index for index, prefix in enumerate(dict.fromkeys(prefixes))}
        return {name: order[prefix] for name, prefix in zip(names, prefixes, strict=True)}
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    ends: dict[int, int] = {}  # resolution -> index of the last module of its last feature
    for feature in info:
        module = feature["module"]
        inside = [index for name, index in order.items() if f"{name}.".startswith(f"{module}.")]
        ends[feature["reduction"]] = max(inside, default=-1)
    last = sorted(ends.values())
    return {name: next((s for s, end in enumerate(last) if order[name] <= end), None) for name in names}


def _up_to_number(name: str) -> str:
    return match[0] if (match := re.match(r"[^\d]*\d+", name)) else ""
