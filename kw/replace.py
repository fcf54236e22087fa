"""Replacing static layers of a model by dynamic ones, in place: what every conversion has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kw.layers import DynamicLayer

Chooser = Callable[[str, nn.Module], Any] | Mapping[str, Any]


def refuse_converted(model: nn.Module) -> None:
    """Raises ValueError if a layer of `model` is dynamic already."""
    if any(isinstance(module, DynamicLayer) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} has dynamic layers already; convert a vanilla model.")


def chosen(model: nn.Module, scope: Chooser, kinds: tuple[type[nn.Module], ...], where: str) -> dict[str, Any]:
    """Layer name -> what the scope says of it, in module order; without layers of which it says None or False.

    Args:
        kinds: what can be replaced, exactly: a subclass may compute something else.
        where: for messages, what the scope does with a layer: `into warehouse {}`.

    Raises:
        ValueError: the scope matches no layer, or names one that does not exist or cannot be replaced.
    """
    known = {name for name, _ in model.named_modules()}
    if isinstance(scope, Mapping):
        for name in scope:
            if name not in known:
                raise ValueError(f"The scope names layer {name!r}, which this {type(model).__name__} does not have.")
    found: dict[str, Any] = {}
    plain = ", ".join(f"nn.{kind.__name__}" for kind in kinds)
    for name, module in model.named_modules():
        said = scope.get(name) if isinstance(scope, Mapping) else scope(name, module)
        if said is None or said is False:
            continue
        if type(module) not in kinds:
            raise ValueError(
                f"The scope puts {name!r}, a {type(module).__name__}, {where.format(repr(said))}: "
                f"only plain {plain} can be dynamic."
            )
        if not name:
            raise ValueError(
                f"The model is itself a {type(module).__name__}, which has no place to be replaced in: "
                f"convert nn.Sequential(model)."
            )
        found[name] = said
    if not found:
        some = [name for name, module in model.named_modules() if type(module) in kinds][:5]
        raise ValueError(
            f"The scope matches no layer of this {type(model).__name__}. "
            f"Layers that could be dynamic ({plain}): {', '.join(some) or 'none'}{', ...' if len(some) == 5 else ''}."
        )
    return found


def like(static: nn.Module, dynamic: DynamicLayer) -> DynamicLayer:
    """The dynamic layer with the static one's bias, device, precision and mode."""
    dynamic.to(static.get_parameter("weight")).train(static.training)
    bias = getattr(static, "bias", None)
    if isinstance(bias, nn.Parameter):
        dynamic.bias = bias
    return dynamic


def convolution_arguments(layer: Any) -> tuple[Any, ...]:
    """Those that built a convolution, static or dynamic, in order."""
    return (
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
    )


def replace(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Put each layer's replacement in its places: a layer may be used in several."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[module])
