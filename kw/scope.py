"""The default scope, for any model: one warehouse per stage and kind of layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction

from torch import nn

from kw.config import KWConfig

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

# Most mixtures in a warehouse at n = 1, because attentions grow with their square. Published rows have up to 138, and
# 441 in depthwise warehouses.
MAX_MIXTURES = 64
MAX_MIXTURES_DEPTHWISE = 256


def kind_of(layer: nn.Module) -> str:
    """`linear`, `pointwise`, `depthwise`, `grouped` or `conv`: kernels of a kind can be cut into the same cells."""
    if isinstance(layer, nn.Linear):
        return "linear"
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if layer.groups > 1:
        return "depthwise" if layer.groups == layer.in_channels else "grouped"
    return "pointwise" if math.prod(layer.kernel_size) == 1 else "conv"


def default_scope(model: nn.Module) -> dict[str, str]:
    """Layer name -> warehouse name, `stage{s}_{kind}`, for every plain convolution and linear layer of `model` but

    - the first, which reads the image, and the classifier (`model.get_classifier()`, or else the last layer);
    - those of squeeze-and-excitation blocks (below a module named `se`), which are an attention already;
    - those inside `nn.MultiheadAttention`, which reads their weights itself.

    Stages are timm's: up to each module of `model.feature_info`, those of one resolution together. In a model without
    it, names make stages, up to the first number in a layer's name: `layer1` and `blocks.3` are stages.

    If a stage has many layers, or channels with a small common divisor, one warehouse would have so many cells that the
    attentions outgrow the model. Then further layers of the stage get a second one (`stage{s}_{kind}_2`, and so on).
    """
    names = [name for name, module in model.named_modules() if type(module) in KINDS]
    hidden = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    static = {*names[:1], *classifiers(model, names)}
    stages = _stages(model, names)
    warehouses_of: dict[str, list[list[str]]] = {}
    for name in names:
        inside = any(name.startswith(f"{prefix}.") for prefix in hidden)
        if name in static or inside or "se" in name.split(".") or stages[name] is None:
            continue
        warehouses = warehouses_of.setdefault(f"stage{stages[name]}_{kind_of(model.get_submodule(name))}", [])
        if warehouses and _fit(model, [*warehouses[-1], name]):
            warehouses[-1].append(name)
        else:
            warehouses.append([name])
    return {
        name: group if number == 1 else f"{group}_{number}"
        for group, warehouses in warehouses_of.items()
        for number, layers in enumerate(warehouses, start=1)
        for name in layers
    }


def default_config(model: nn.Module, groups: Mapping[str, list[str]], config: KWConfig) -> dict[str, KWConfig]:
    """Warehouse name -> its settings, for warehouses of the default scope (warehouse name -> its layers). They are
    `config`, but

    - below n = 1, depthwise kernels stay at n = 1 and uncut, as in the published MobileNetV2 rows: they have few
      parameters, and the single input channel of a position cannot be cut;
    - where the side of a cell does not divide the layers' channels (24 of Mixer's 49 tokens), it becomes the next
      smaller divisor.
    """
    configs = {}
    for warehouse, names in groups.items():
        if config.n < 1 and kind_of(model.get_submodule(names[0])) == "depthwise":  # so are the others
            configs[warehouse] = config.replace(n=1, cell_in=1, cell_out=1)
            continue
        shapes = [model.get_parameter(f"{name}.weight").shape for name in names]
        sides = {
            key: _dividing(math.gcd(*(shape[axis] for shape in shapes)), getattr(config, key))
            for key, axis in (("cell_out", 0), ("cell_in", 1))
        }
        configs[warehouse] = config.replace(**sides)
    return configs


def _dividing(channels: int, fraction: Fraction) -> Fraction:
    """The largest fraction of `channels`, up to `fraction`, that is a divisor of them."""
    side = max(int(channels * fraction), 1)
    return Fraction(next(divisor for divisor in range(side, 0, -1) if channels % divisor == 0), channels)


def _fit(model: nn.Module, names: list[str]) -> bool:
    """Whether these layers have few enough mixtures for one warehouse, with uncut cells."""
    shapes = [model.get_parameter(f"{name}.weight").shape for name in names]
    o, i = (math.gcd(*(shape[side] for shape in shapes)) for side in (0, 1))
    mixtures = sum(math.prod(shape) // (o * i) for shape in shapes)
    depthwise = kind_of(model.get_submodule(names[0])) == "depthwise"
    return mixtures <= (MAX_MIXTURES_DEPTHWISE if depthwise else MAX_MIXTURES)


def classifiers(model: nn.Module, names: list[str]) -> set[str]:
    """Names of the model's last layers: `model.get_classifier()`, or else the last of `names`."""
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return set(names[-1:])
    head = get_classifier()
    heads = set(head) if isinstance(head, (tuple, list)) else {head}
    return {name for name, module in model.named_modules() if module in heads}


def _stages(model: nn.Module, names: list[str]) -> dict[str, int | None]:
    """The stage of each layer; None after the last stage."""
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    info = [feature for feature in getattr(model, "feature_info", None) or () if feature["module"] in order]
    if not info:
        prefixes = {name: _up_to_number(name) for name in names}
        numbers = {prefix: number for number, prefix in enumerate(dict.fromkeys(prefixes.values()))}
        return {name: numbers[prefix] for name, prefix in prefixes.items()}
    ends: dict[int, int] = {}  # resolution -> index of the last module of its last feature
    for feature in info:
        module = feature["module"]
        inside = [index for name, index in order.items() if f"{name}.".startswith(f"{module}.")]
        ends[feature["reduction"]] = max(inside, default=-1)
    last = sorted(ends.values())
    return {name: next((s for s, end in enumerate(last) if order[name] <= end), None) for name in names}


def _up_to_number(name: str) -> str:
    return match[0] if (match := re.match(r"[^\d]*\d+", name)) else ""
