"""Conversion to one of the methods to compare with, like `kw.convert`, but without warehouses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from kw.baselines.registry import check_budget, check_settings, find
from kw.config import BudgetLike
from kw.replace import chosen, convolution_arguments, like, refuse_converted, replace
from kw.scope import classifiers, kind_of
from kw.temperature import share_temperature

Choice = Callable[[str, nn.Module], bool] | Iterable[str]


def convert(model: nn.Module, name: str, n: BudgetLike = 1, scope: Choice | None = None, **settings: str) -> nn.Module:
    """Make convolutions of `model` dynamic with the method `name`, in place, and return it.

    Args:
        model: any model built of `nn.Conv2d`, such as one of timm's. Linear layers stay static.
        name: of `BASELINES`, such as "odconv".
        n: the number of kernels in a layer, an integer; methods without a budget (`dcd`, `se`) ignore it.
        scope: which layers: names, or a function of `(layer name, layer)`. By default those of `default_scope`.
        settings: of the method: `attention_function="caf"` gives DY-Conv and CondConv the attention function of
            KernelWarehouse, with its temperature.

    Warns if every one of these layers stays static, as those of FDConv do in a ConvNeXt.

    Biases are kept. Kernels are not: they are initialized at random. What was set on a layer is kept, as in
    `kw.convert`, and an optimizer that was made before must be made again.

    Raises:
        ValueError: there is no such method or setting, n is not an integer, or the scope matches no layer, or names one
            that does not exist or cannot be dynamic. The model is then unchanged.
    """
    refuse_converted(model)
    method, kernels = find(name), check_budget(name, n)
    check_settings(name, settings)
    scope = default_scope(model) if scope is None else scope
    names = chosen(
        model, scope if callable(scope) else dict.fromkeys(scope, True), (nn.Conv2d,), f"among {name} layers"
    )
    keywords: dict[str, Any] = {"n": kernels, **settings} if method.budget else settings
    layers: dict[nn.Module, nn.Module] = {}
    for layer_name in names:
        static = model.get_submodule(layer_name)
        layers[static] = like(static, method.layer(*convolution_arguments(static), **keywords), layer_name)
    if all(getattr(layer, "attention", None) is None for layer in layers.values()):
        with_n = f" with n = {n}" if method.budget else ""
        remedy = "take n = 2 or more" if method.budget and kernels == 1 else "choose other layers, or another method"
        warnings.warn(
            f"{name}{with_n} makes nothing dynamic in {type(model).__name__}: no layer that it replaces "
            f"({len(layers)}) has an attention. To compare, {remedy}.",
            stacklevel=2,
        )
    replace(model, layers)
    share_temperature(model)
    return model


def default_scope(model: nn.Module) -> list[str]:
    """Names of all plain `nn.Conv2d` of `model` but

    - the first, which reads the image, and a classifier;
    - the pointwise one of a shortcut (below a module named `downsample` or `shortcut`);
    - those of squeeze-and-excitation blocks (below a module named `se`), which are an attention already.

    ODConv's release has this scope, as its published parameters show: in ResNet18 and ResNet50 the blocks'
    convolutions, in MobileNetV2 also the last one.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Conv2d]
    static = {*names[:1], *classifiers(model, [])}
    return [
        name
        for name in names
        if name not in static
        and "se" not in name.split(".")
        and not (
            kind_of(model.get_submodule(name)) == "pointwise" and {"downsample", "shortcut"} & set(name.split("."))
        )
    ]
