"""Conversion: a model with static layers becomes one whose layers draw their kernels from warehouses, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from kw.config import KWConfig
from kw.freezing import refuse_frozen
from kw.layers import DynamicLayer, KWConv1d, KWConv2d, KWConv3d, KWLinear
from kw.replace import chosen, convolution_arguments, like, refuse_converted, replace
from kw.scope import default_config, default_scope
from kw.sharing import regroup
from kw.temperature import share_temperature, temperatures
from kw.warehouse import Draw, KernelShape, Warehouse, Warehouses

Scope = Callable[[str, nn.Module], str | None] | Mapping[str, str]
Configs = KWConfig | Mapping[str, KWConfig] | Callable[[str], KWConfig]

CONVOLUTIONS: dict[type[nn.Module], type[KWConv1d | KWConv2d | KWConv3d]] = {
    nn.Conv1d: KWConv1d,
    nn.Conv2d: KWConv2d,
    nn.Conv3d: KWConv3d,
}


def convert(model: nn.Module, scope: Scope | None = None, config: Configs | None = None) -> nn.Module:
    """Make layers of `model` dynamic, in place, and return it.

    Args:
        model: any model built of `nn.Conv1d/2d/3d` and `nn.Linear`, such as one of timm's.
        scope: which layer draws from which warehouse: a function of `(layer name, layer)` that gives a warehouse's
            name, or None for a layer that stays static; or a mapping from layer names to warehouse names.
            Left out: one warehouse per stage and kind of layer, stem and classifier static (`kw.default_scope`).
        config: a `KWConfig` for every warehouse, or one each: a mapping or a function from the warehouse's name.
            Its `sharing` and `partition` join or split what the scope says (`kw.sharing`), which then renames.

    The warehouses are registered as `model.warehouses`, in the order in which layers first draw from them.
    Biases are kept; kernels are not: cells are initialized anew.

    Raises:
        ValueError: the scope matches no layer, names one that does not exist or cannot be dynamic, a warehouse
            has no config, or its kernels cannot be cut and given out; the message names layer or warehouse.
    """
    refuse_converted(model)
    if hasattr(model, "warehouses"):
        raise ValueError(f"This {type(model).__name__} has an attribute 'warehouses' of its own, where ours would go.")
    config = KWConfig() if config is None else config
    drawing = _drawing(model, default_scope(model) if scope is None else scope)
    configs = {warehouse_name: _config_of(warehouse_name, config) for warehouse_name in drawing}
    drawing, configs = regroup(model, drawing, configs)
    if scope is None and isinstance(config, KWConfig):
        configs = default_config(model, drawing, config)

    warehouses = Warehouses()
    layers: dict[nn.Module, nn.Module] = {}
    for warehouse_name, names in drawing.items():
        kernels = [_kernel(model, name) for name in names]
        warehouse = Warehouse(kernels, configs[warehouse_name], name=warehouse_name)
        warehouses[warehouse_name] = warehouse.to(_weight(model, names[0]))
        for name, draw in zip(names, warehouse.draws, strict=True):
            static = model.get_submodule(name)
            layers[static] = _dynamic(static, draw)

    # Nothing was changed up to here: an error leaves the model as it was.
    replace(model, layers)
    model.warehouses = warehouses
    share_temperature(model)
    return model


def set_temperature(model: nn.Module, tau: float) -> None:
    """Set the temperature of every attention in `model`, 1 when training begins and 0 once it is warmed up.

    In a warehouse's layers 1 anchors each mixture to its cell and 0 leaves it free; what it means to the layers of
    `kw.baselines` is described there.

    Raises:
        ValueError: tau is not in [0, 1], or no attention of the model has a temperature, or it is frozen.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"temperature {tau!r} must be between 0 (trained) and 1 (start of the warm-up).")
    refuse_frozen(model, "keeps its temperature")
    found = temperatures(model)
    if not found:
        raise ValueError(
            f"This {type(model).__name__} has no dynamic layer to set a temperature of; kw.convert it first "
            f"(or it is of a kind without temperature)."
        )
    for temperature in found:
        temperature.set(tau)


def _drawing(model: nn.Module, scope: Scope) -> dict[str, list[str]]:
    """Warehouse name -> names of its layers, both in module order."""
    drawing: dict[str, list[str]] = {}
    for name, warehouse in chosen(model, scope, (*CONVOLUTIONS, nn.Linear), "into warehouse {}").items():
        if not isinstance(warehouse, str) or not warehouse or "." in warehouse or hasattr(Warehouses, warehouse):
            raise ValueError(
                f"The scope names a warehouse {warehouse!r} (layer {name!r}): a text is needed, "
                f"without dots and not the name of a method of nn.ModuleDict; 'stage1' would do."
            )
        drawing.setdefault(warehouse, []).append(name)
    return drawing


def _config_of(warehouse: str, config: Configs) -> KWConfig:
    if isinstance(config, KWConfig):
        return config
    if isinstance(config, Mapping):
        if warehouse not in config:
            raise ValueError(f"There is no config for warehouse {warehouse!r}; there are some for {', '.join(config)}.")
        return config[warehouse]
    return config(warehouse)


def _kernel(model: nn.Module, name: str) -> KernelShape:
    return KernelShape(name, tuple(_weight(model, name).shape))


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def _dynamic(layer: nn.Module, draw: Draw) -> DynamicLayer:
    """The dynamic layer that takes the place of a static one."""
    if isinstance(layer, nn.Linear):
        return like(layer, KWLinear(layer.in_features, layer.out_features, layer.bias is not None, draw=draw))
    return like(layer, CONVOLUTIONS[type(layer)](*convolution_arguments(layer), draw=draw))
