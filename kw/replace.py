"""Replacing layers of a model, in place: what every conversion needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kw.layers import DynamicLayer, KWLayer
from kw.warehouse import Warehouses

Chooser = Callable[[str, nn.Module], Any] | Mapping[str, Any]


def refuse_converted(model: nn.Module) -> None:
    """Raises ValueError if a layer of `model` is dynamic already."""
    if any(isinstance(module, DynamicLayer) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} has dynamic layers already; convert a vanilla model.")


def chosen(model: nn.Module, scope: Chooser, kinds: tuple[type[nn.Module], ...], where: str) -> dict[str, Any]:
    """Layer name -> the scope's value for it, in module order, without the layers for which that is None or False.

    Args:
        kinds: exact types of layers that can be replaced; a subclass may compute something else.
        where: for messages, where the scope puts a layer: `into warehouse {}`.

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
        value = scope.get(name) if isinstance(scope, Mapping) else scope(name, module)
        if value is None or value is False:
            continue
        if type(module) not in kinds:
            raise ValueError(
                f"The scope puts {name!r}, a {type(module).__name__}, {where.format(repr(value))}: "
                f"only plain {plain} can be dynamic."
            )
        if computes_weight(module):
            raise ValueError(
                f"The scope puts {name!r} {where.format(repr(value))}, but its weight is computed from other "
                f"parameters (by weight_norm, spectral_norm or pruning), which a dynamic layer does not have. Remove "
                f"that first, or leave the layer out of the scope."
            )
        if not name:
            raise ValueError(
                f"The model is itself a {type(module).__name__}, and has no parent in which to replace it: "
                f"convert nn.Sequential(model)."
            )
        found[name] = value
    if not found:
        some = [name for name, module in model.named_modules() if type(module) in kinds][:5]
        raise ValueError(
            f"The scope matches no layer of this {type(model).__name__}. "
            f"Layers that could be dynamic ({plain}): {', '.join(some) or 'none'}{', ...' if len(some) == 5 else ''}."
        )
    return found


def like(static: nn.Module, dynamic: DynamicLayer, name: str) -> DynamicLayer:
    """Give the dynamic layer what the static one has: bias, device, dtype, mode, hooks; and if its weight is frozen, no
    parameter of the layer's own is trained.

    Args:
        name: of the static layer, for a warning of what cannot be carried over.
    """
    weight = static.get_parameter("weight")
    dynamic.to(weight).train(static.training)
    own = dynamic.own_parameters() if isinstance(dynamic, KWLayer) else dynamic.parameters()
    for parameter in own:
        parameter.requires_grad_(weight.requires_grad)
    bias = getattr(static, "bias", None)
    if isinstance(bias, nn.Parameter):
        dynamic.bias = bias
    carry_hooks(static, dynamic, name)
    return dynamic


# Dictionaries of a module that hold its hooks, or how they are called.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
HOOKS_OF_STATE = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def carry_hooks(old: nn.Module, new: nn.Module, name: str) -> None:
    """Let hooks of `old` run on `new`, which has none of its own. Their handles still remove them. Warns of hooks on
    the state dict, which expect the entries of `old`, and of a `forward` that was replaced on `old`."""
    for key in HOOKS:
        if key in vars(old):
            object.__setattr__(new, key, vars(old)[key])
    lost = ["hooks on its state dict"] if any(vars(old).get(key) for key in HOOKS_OF_STATE) else []
    lost += ["a replaced forward method"] if "forward" in vars(old) else []
    if lost:
        warnings.warn(
            f"Layer {name!r} had {' and '.join(lost)}, which the layer in its place does not have.", stacklevel=2
        )


def computes_weight(layer: nn.Module) -> bool:
    """Whether the layer's weight is no parameter, but computed from some: by weight_norm, spectral_norm or pruning, old
    or as a parametrization."""
    return not isinstance(layer._parameters.get("weight"), nn.Parameter)


def convolution_arguments(layer: Any) -> tuple[Any, ...]:
    """Positional arguments of a convolution's constructor, read from a static or dynamic layer."""
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
    """Replace each layer wherever the model has it: a layer may be used in several places."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[module])


def drop_unused_warehouses(model: nn.Module) -> None:
    """Remove warehouses from `warehouses` of `model` and its parts that no layer uses any longer, to free memory."""
    used = {layer.warehouse for layer in model.modules() if isinstance(layer, KWLayer)}
    for part in model.modules():
        listed = vars(part).get("warehouses")
        if isinstance(listed, Warehouses):
            for name, warehouse in list(listed.items()):
                if warehouse not in used:
                    del listed[name]
