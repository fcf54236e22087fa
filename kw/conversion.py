"""Conversion: replace static layers of a model by dynamic ones that share warehouses, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from torch import nn

from kw.config import KWConfig
from kw.layers import DynamicLayer, KWConv1d, KWConv2d, KWConv3d, KWLinear
from kw.replace import chosen, convolution_arguments, like, refuse_converted, replace
from kw.scope import default_config, default_scope
from kw.sharing import Groups, regroup
from kw.temperature import share_temperature
from kw.warehouse import KernelShape, Share, Warehouse, Warehouses

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
        scope: which layers share a warehouse: a function from `(layer name, layer)` to a warehouse's name, or None for
            a layer that stays static; or a mapping from layer names to warehouse names. By default one warehouse per
            stage and kind of layer, with stem and classifier static (`kw.default_scope`).
        config: a `KWConfig` for every warehouse, or one each: a mapping or a function from the warehouse's name.
            Its `sharing` and `partition` may merge, split and rename the scope's warehouses (`kw.sharing`).

    Each layer has its warehouse as a submodule, `layer.warehouse`. `model.warehouses` lists them by name, in the order
    in which layers first use them. Biases are kept. Kernels are not: cells are initialized at random.

    What was set on a layer is kept: training mode, device, dtype, hooks. Where its weight was frozen
    (`requires_grad=False`), so is its attention; cells are frozen if the weights of all their layers were. What cannot
    be kept is warned of. An optimizer that was made before has the old layers' parameters: make it again.

    Raises:
        ValueError: the scope matches no layer, names one that does not exist or cannot be dynamic; a warehouse has no
            config; or its kernels cannot be cut into cells. The message names layer or warehouse, and the model is
            unchanged.
    """
    refuse_converted(model)
    if hasattr(model, "warehouses"):
        raise ValueError(
            f"This {type(model).__name__} has an attribute 'warehouses' already, where kw.convert would put its own."
        )
    config = KWConfig() if config is None else config
    groups = _groups(model, default_scope(model) if scope is None else scope)
    configs = {warehouse: _config_of(warehouse, config) for warehouse in groups}
    groups, configs = regroup(model, groups, configs)
    if scope is None and isinstance(config, KWConfig):
        configs = default_config(model, groups, config)

    warehouses = Warehouses()
    layers: dict[nn.Module, nn.Module] = {}
    partly: Groups = {}  # warehouse -> its layers with frozen weights, where others are trained
    for warehouse_name, names in groups.items():
        kernels = [_kernel(model, name) for name in names]
        warehouse = Warehouse(kernels, configs[warehouse_name], name=warehouse_name)
        warehouses[warehouse_name] = warehouse
        for name, share in zip(names, warehouse.shares, strict=True):
            static = model.get_submodule(name)
            layers[static] = _dynamic(static, share)
        warehouse.to(_weight(model, names[0]))
        frozen = [name for name in names if not _weight(model, name).requires_grad]
        warehouse.cells.requires_grad_(len(frozen) < len(names))
        if 0 < len(frozen) < len(names):
            partly[warehouse_name] = frozen

    # The model was not changed so far, so that an error leaves it as it was.
    replace(model, layers)
    object.__setattr__(model, "warehouses", warehouses)  # not as a submodule: layers have them
    share_temperature(model)
    for warehouse_name, frozen in partly.items():
        warnings.warn(
            f"Warehouse {warehouse_name!r}: the weights of {', '.join(map(repr, frozen))} were frozen, but other "
            f"layers train the cells that these use, so that their kernels change too. Put frozen layers into a "
            f"warehouse of their own, or set model.warehouses[{warehouse_name!r}].cells.requires_grad = False.",
            stacklevel=2,
        )
    return model


def _groups(model: nn.Module, scope: Scope) -> Groups:
    groups: Groups = {}
    for name, warehouse in chosen(model, scope, (*CONVOLUTIONS, nn.Linear), "into warehouse {}").items():
        if not isinstance(warehouse, str) or not warehouse or "." in warehouse or hasattr(Warehouses, warehouse):
            raise ValueError(
                f"The scope names a warehouse {warehouse!r} (layer {name!r}): it must be a text without dots, and not "
                f"the name of a method of nn.ModuleDict; 'stage1' would do."
            )
        groups.setdefault(warehouse, []).append(name)
    return groups


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


def _dynamic(layer: nn.Module, share: Share) -> DynamicLayer:
    """The dynamic layer that replaces a static one."""
    if isinstance(layer, nn.Linear):
        linear = KWLinear(layer.in_features, layer.out_features, layer.bias is not None, share=share)
        return like(layer, linear, share.kernel.name)
    return like(layer, CONVOLUTIONS[type(layer)](*convolution_arguments(layer), share=share), share.kernel.name)
