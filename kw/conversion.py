"""Conversion: replace static layers of a model by dynamic ones that share warehouses, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

from torch import nn

from kw.config import KWConfig
from kw.from_static import check_startable, place
from kw.layers import DynamicLayer, KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear
from kw.observing import Example, observe
from kw.planning import Plan
from kw.planning import plan as make_plan
from kw.replace import (
    PLAIN,
    chosen,
    convolution_arguments,
    like,
    plain_base,
    refuse_converted,
    refuse_tied,
    replace,
    why_not_plain,
)
from kw.scope import channels_of, read_by_torch, shape_of
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


def convert(
    model: nn.Module,
    scope: Scope | Plan | None = None,
    config: Configs | None = None,
    *,
    plan: Plan | None = None,
    example: Example = None,
    from_weights: bool = False,
) -> nn.Module:
    """Make layers of `model` dynamic, in place, and return it.

    Args:
        model: any model built of `nn.Conv1d/2d/3d` and `nn.Linear`, such as one of timm's.
        scope: which layers share a warehouse: a function from `(layer name, layer)` to a warehouse's name, or None for
            a layer that stays static; or a mapping from layer names to warehouse names. By default, and with a
            `kw.Plan` in its place, as that of `kw.plan(model, config)`, which weighs what attention costs and what
            cells save.
        config: a `KWConfig` for every warehouse; with a scope also one each: a mapping or a function from the
            warehouse's name. Its `sharing` and `partition` may merge, split and rename a scope's warehouses
            (`kw.sharing`).
        plan: of this model, or one built alike. It has the settings, so `scope` and `config` are left out.
        example: an input of the model, for models whose input cannot be guessed (`kw.plan`).
        from_weights: start from the model's weights: its kernels become the cells that anchor mixtures. At temperature
            1 its outputs are then those of the static model, to rounding, and at temperature 0 close to them
            (`kw.from_static`). For n of at least 1.

    Each layer has its warehouse as a submodule, `layer.warehouse`. `model.warehouses` lists them by name, in the order
    in which layers first use them. Biases are kept. Kernels are only with `from_weights`; else cells are random.

    What was set on a layer is kept: training mode, device, dtype, hooks. Where its weight was frozen
    (`requires_grad=False`), so is its attention; cells are frozen if the weights of all their layers were. What cannot
    be kept is warned of. An optimizer that was made before has the old layers' parameters: make it again.

    Raises:
        ValueError: the scope matches no layer, names one that does not exist, cannot be dynamic or whose weight the
            model reads itself or shares with another module; no layer would gain; the plan is of another model; a
            warehouse has no `KWConfig`; or its kernels cannot be cut into cells. The message names layer or warehouse,
            and the model is unchanged.

    Warns:
        UserWarning: by default, if less than half of what n asks for can be reached; with a scope, if the first
            dimension of a layer's input does not count samples.
    """
    refuse_converted(model)
    if hasattr(model, "warehouses"):
        raise ValueError(
            f"This {type(model).__name__} has an attribute 'warehouses' already, where kw.convert would put its own."
        )
    if isinstance(scope, Plan):
        if plan is not None:
            raise ValueError("Pass one plan: here are two.")
        scope, plan = None, scope
    if plan is not None:
        if scope is not None or config is not None or example is not None:
            raise ValueError("A plan has its scope and settings: pass a plan alone, or scope, config and example.")
        _check_gain(plan)
        return _convert(model, *_planned(model, plan), from_weights)
    if scope is None:
        if config is not None and not isinstance(config, KWConfig):
            raise ValueError("Without a scope, config is one KWConfig for all warehouses.")
        made = make_plan(model, config, example=example)
        _check_gain(made)
        return _convert(model, *_planned(model, made), from_weights)
    if not callable(scope) and not isinstance(scope, Mapping):
        raise ValueError(
            f"scope={scope!r} is neither a function, nor a mapping, nor a plan. A budget goes into the config: "
            f"kw.convert(model, config=kw.KWConfig(n=2))."
        )
    groups, configs = _asked(model, scope, KWConfig() if config is None else config)
    _check_use(model, [name for names in groups.values() for name in names], example)
    _convert(model, groups, configs, from_weights)
    _warn_of_rounding(model.warehouses)  # type: ignore[arg-type]
    return model


def convert_by_scope(model: nn.Module, scope: Scope, config: Configs, from_weights: bool = False) -> nn.Module:
    """`convert` for a scope that is known to fit the model, without a forward pass to see which weights it reads."""
    refuse_converted(model)
    _convert(model, *_asked(model, scope, config), from_weights)
    _warn_of_rounding(model.warehouses)  # type: ignore[arg-type]
    return model


def convert_as(model: nn.Module, groups: Groups, configs: Mapping[str, KWConfig]) -> nn.Module:
    """`convert` to exactly these warehouses, those of a model that was converted before.

    Raises:
        AttributeError, ValueError: the model does not have such layers.
    """
    refuse_converted(model)
    for name in (name for names in groups.values() for name in names):
        if plain_base(model.get_submodule(name)) is None:
            raise ValueError(f"layer {name!r} cannot be dynamic: {why_not_plain(model.get_submodule(name))}")
    return _build(model, groups, configs)


def _convert(model: nn.Module, groups: Groups, configs: Mapping[str, KWConfig], from_weights: bool) -> nn.Module:
    if not from_weights:
        return _build(model, groups, configs)
    check_startable(configs.values())
    kernels = {name: _weight(model, name) for names in groups.values() for name in names}
    _build(model, groups, configs)
    for name, kernel in kernels.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, KWLayer)
        place(layer, kernel)
    return model


def _build(model: nn.Module, groups: Groups, configs: Mapping[str, KWConfig]) -> nn.Module:
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
            stacklevel=4,
        )
    return model


def _warn_of_rounding(warehouses: Warehouses) -> None:
    """Below n = 1 every layer has a cell of its own, however few its mixtures."""
    rounded = [
        f"{name!r} ({len(w.cells)} cells for {w.mixtures} mixtures at n = {w.config.n})"
        for name, w in warehouses.items()
        if isinstance(w, Warehouse) and w.config.n < 1 and len(w.cells) > Fraction(5, 4) * w.config.n * w.mixtures
    ]
    if rounded:
        more = f" and {len(rounded) - 3} more" if len(rounded) > 3 else ""
        warnings.warn(
            f"These warehouses have more cells than n asks for, since each layer has at least one of its own: "
            f"{', '.join(rounded[:3])}{more}. Cut smaller cells (cell_in, cell_out), so that each layer has at least "
            f"1/n mixtures.",
            stacklevel=3,
        )


def _asked(model: nn.Module, scope: Scope, config: Configs) -> tuple[Groups, dict[str, KWConfig]]:
    """The warehouses of a user's scope, and the settings of each."""
    groups = _groups(model, scope)
    return regroup(model, groups, {warehouse: _config_of(warehouse, config) for warehouse in groups})


def _planned(model: nn.Module, plan: Plan) -> tuple[Groups, dict[str, KWConfig]]:
    """The warehouses of a plan, if it fits."""
    planned = {layer.name: layer for layer in plan.layers}
    known = dict(model.named_modules())
    for name, layer in planned.items():
        found = known.get(name)
        if found is None or not isinstance(found, PLAIN) or (name in plan.scope and plain_base(found) is None):
            here = "nothing" if found is None else f"a {type(found).__name__}"
        elif (shape_of(found), channels_of(found)) != (layer.shape, layer.channels):
            here = f"a kernel of shape {shape_of(found)} for {channels_of(found)} channels"
        else:
            continue
        raise ValueError(
            f"The plan is of another model: its layer {name!r} has a kernel of shape {layer.shape} for "
            f"{layer.channels} channels, and this {type(model).__name__} has {here} there. Make it of this model: "
            f"kw.plan(model, n)."
        )
    more = [name for name, module in known.items() if isinstance(module, PLAIN) and name not in planned]
    if more:
        raise ValueError(f"The plan is of another model: it does not know layer {more[0]!r}. Make it of this one.")
    refuse_tied(model, plan.scope)
    return {warehouse.name: list(warehouse.layers) for warehouse in plan.warehouses}, plan.configs


def _check_gain(plan: Plan) -> None:
    if not plan.warehouses:
        reasons = [f"{name!r}: {why}" for name, why in plan.static.items()]
        listed = f"{'; '.join(reasons[:3])}{'; ...' if len(reasons) > 3 else ''}" if reasons else "It has no layers"
        raise ValueError(
            f"No layer of this {plan.model} would be dynamic ({plan.summary()}). {listed}. print(kw.plan(model, n)) "
            f"lists all reasons; another n may suit, and a scope of your own converts what you name."
        )
    if plan.gains_little:
        warnings.warn(f"{plan.model}: {plan.summary()}; print(kw.plan(model, n)) lists the reasons.", stacklevel=3)


def _check_use(model: nn.Module, names: list[str], example: Example) -> None:
    """Raises ValueError for layers whose weight the model reads in its forward pass.
    Warns of layers in whose input the first dimension does not count samples."""
    every = [name for name, module in model.named_modules() if isinstance(module, PLAIN) and name]
    seen = observe(model, every, example)
    read = read_by_torch(model, names) | (seen.read & set(names) if seen is not None else set())
    if read:
        raise ValueError(
            f"The model reads the weight of {_some(read)} itself, and a dynamic layer has none: leave "
            f"{'it' if len(read) == 1 else 'them'} out of the scope."
        )
    layers = {} if seen is None else seen.layers
    mixed = {name for name in names if name in layers and not layers[name].per_sample}
    if mixed:
        warnings.warn(
            f"The first dimension of the input of {_some(mixed)} does not count samples: the attention averages over "
            f"them, and the output of a sample depends on the others of its batch.",
            stacklevel=3,
        )


def _some(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(map(repr, first[:4])) + (", ..." if len(first) > 4 else "")


def _groups(model: nn.Module, scope: Scope) -> Groups:
    groups: Groups = {}
    for name, warehouse in chosen(model, scope, PLAIN, "into warehouse {}").items():
        if not isinstance(warehouse, str) or not warehouse or "." in warehouse or hasattr(Warehouses, warehouse):
            raise ValueError(
                f"The scope names a warehouse {warehouse!r} (layer {name!r}): it must be a text without dots, and not "
                f"the name of a method of nn.ModuleDict; 'stage1' would do."
            )
        groups.setdefault(warehouse, []).append(name)
    return groups


def _config_of(warehouse: str, config: Configs) -> KWConfig:
    if isinstance(config, Mapping) and warehouse not in config:
        raise ValueError(f"There is no config for warehouse {warehouse!r}; there are some for {', '.join(config)}.")
    found = config[warehouse] if isinstance(config, Mapping) else config(warehouse) if callable(config) else config
    if not isinstance(found, KWConfig):
        raise ValueError(
            f"The config of warehouse {warehouse!r} is {found!r}, but must be a kw.KWConfig, such as kw.KWConfig(n=2)."
        )
    return found


def _kernel(model: nn.Module, name: str) -> KernelShape:
    return KernelShape(name, tuple(_weight(model, name).shape))


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def _dynamic(layer: nn.Module, share: Share) -> DynamicLayer:
    """The dynamic layer that replaces a static one."""
    if isinstance(layer, nn.Linear):
        linear = KWLinear(layer.in_features, layer.out_features, layer.bias is not None, share=share)
        return like(layer, linear, share.kernel.name)
    base = plain_base(layer)
    assert base is not None
    return like(layer, CONVOLUTIONS[base](*convolution_arguments(layer), share=share), share.kernel.name)
