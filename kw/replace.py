"""Replacing layers of a model, in place: what every conversion needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from kw.layers import DynamicLayer, KWLayer
from kw.warehouse import Warehouses

Chooser = Callable[[str, nn.Module], Any] | Mapping[str, Any]


PLAIN: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def plain_base(layer: nn.Module) -> type[nn.Module] | None:
    """The class of `PLAIN` whose function `layer` computes: its own, or that of which it is a subclass with the same
    forward pass (torchvision's `Conv3DSimple`). None if it computes something else, or its weight is computed."""
    return None if why_not_plain(layer) else next(base for base in PLAIN if isinstance(layer, base))


def why_not_plain(layer: nn.Module) -> str | None:
    """Why `layer` cannot be replaced by a dynamic one of the same function; None if it can."""
    base = next((base for base in PLAIN if isinstance(layer, base)), None)
    name = type(layer).__name__
    if base is None:
        return f"{name} is neither a convolution nor a linear layer"
    if isinstance(layer._parameters.get("weight"), nn.parameter.UninitializedParameter):
        return f"{name} has no shape yet"
    if computed := computed_parameter(layer):
        return f"its {computed} is computed from other parameters"
    methods = [key for key in ("forward", "_conv_forward") if hasattr(base, key)]
    if any(getattr(type(layer), key) is not getattr(base, key) for key in methods):
        return f"{name} computes something else than nn.{base.__name__}"
    return None


def refuse_converted(model: nn.Module) -> None:
    """Raises ValueError if a layer of `model` is dynamic already."""
    if any(isinstance(module, DynamicLayer) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} has dynamic layers already; convert a vanilla model.")


def chosen(model: nn.Module, scope: Chooser, kinds: tuple[type[nn.Module], ...], where: str) -> dict[str, Any]:
    """Layer name -> the scope's value for it, in module order, without the layers for which that is None or False.

    Args:
        kinds: of `PLAIN`, those that can be replaced (`plain_base`).
        where: for messages, where the scope puts a layer: `into warehouse {}`.

    Raises:
        ValueError: the scope matches no layer, or names one that does not exist or cannot be replaced.
    """
    known = {name for name, _ in model.named_modules()}
    if isinstance(scope, Mapping):
        for name in scope:
            if name in dict(model.named_modules(remove_duplicate=False)).keys() - known:
                same = next(first for first, module in model.named_modules() if module is model.get_submodule(name))
                raise ValueError(f"The scope names layer {name!r}, which is the same module as {same!r}: name that.")
            if name not in known:
                raise ValueError(f"The scope names layer {name!r}, which this {type(model).__name__} does not have.")
    found: dict[str, Any] = {}
    plain = ", ".join(f"nn.{kind.__name__}" for kind in kinds)
    for name, module in model.named_modules():
        value = scope.get(name) if isinstance(scope, Mapping) else scope(name, module)
        if value is None or value is False:
            continue
        if isinstance(module, kinds) and (computed := computed_parameter(module)):
            raise ValueError(
                f"The scope puts {name!r} {where.format(repr(value))}, but its {computed} is computed from other "
                f"parameters (by weight_norm, spectral_norm or pruning), which a dynamic layer does not have. Remove "
                f"that first, or leave the layer out of the scope."
            )
        if plain_base(module) not in kinds:
            raise ValueError(
                f"The scope puts {name!r}, a {type(module).__name__}, {where.format(repr(value))}: "
                f"only plain {plain} can be dynamic{_hint(module)}."
            )
        if not name:
            raise ValueError(
                f"The model is itself a {type(module).__name__}, and has no parent in which to replace it: "
                f"convert nn.Sequential(model)."
            )
        found[name] = value
    refuse_tied(model, found)
    if not found:
        some = [name for name, module in model.named_modules() if plain_base(module) in kinds][:5]
        raise ValueError(
            f"The scope matches no layer of this {type(model).__name__}. "
            f"Layers that could be dynamic ({plain}): {', '.join(some) or 'none'}{', ...' if len(some) == 5 else ''}."
        )
    return found


def _hint(module: nn.Module) -> str:
    return f" ({why_not_plain(module)})" if isinstance(module, PLAIN) else ""


def refuse_tied(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError if one of these layers shares its weight with another module, which replacing it would undo."""
    shared = shared_weights(model)
    tied = [name for name in names if id(getattr(model.get_submodule(name), "weight", None)) in shared]
    if tied:
        raise ValueError(
            f"The weight of {tied[0]!r} is also another module's, and would no longer be: leave the layer out of the "
            f"scope, or untie the weights first."
        )


def shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that several modules of `model` hold."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


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


def computed_parameter(layer: nn.Module) -> str | None:
    """Which of weight and bias is not a parameter, but computed from some: by weight_norm, spectral_norm or pruning,
    old or as a parametrization. None if both are plain."""
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "weight"
    return "bias" if layer.bias is not None and layer._parameters.get("bias") is None else None


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
