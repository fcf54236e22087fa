"""A model in plain values: timm's name and arguments of the static model, and which of its layers are dynamic, how.

    {"base": "resnet18", "args": {"num_classes": 10},
     "warehouses": [{"name": "stage0", "layers": ["layer1.0.conv1", ...], "settings": {"n": "1/4", ...}}, ...]}

A static model has no "warehouses". One of `kw.baselines` has {"method": "odconv", "n": 4, "layers": [...]} in place of
them, and "settings" of the method if they are not the usual ones. A model that timm did not build has the base None,
and is built by whoever has its code.

`build` makes the model again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.models import get_model_args
from torch import nn

from kw.backbones import BACKBONES, Backbone
from kw.baselines import BASELINES
from kw.baselines import convert as convert_to_baseline
from kw.baselines.registry import find
from kw.config import STATIC, KWConfig
from kw.conversion import convert_as
from kw.layers import DynamicLayer, KWLayer

NAME = "kernelwarehouse"  # in timm's registry
KEYS = ("base", "args", "warehouses", "method", "n", "layers", "settings")
WAREHOUSE = {"name": str, "layers": list, "settings": dict}  # keys of a warehouse, and what they have
# Arguments of timm's that load something, or have no effect on what is computed.
NOT_KEPT = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir",
            "checkpoint_path", "features_only", "device", "dtype")  # fmt: skip
CURRENT = ("num_classes", "in_chans", "img_size")  # of timm's arguments, those that methods of a model change


def describe(model: nn.Module, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The description of a model.

    Args:
        args: timm's keyword arguments of the static model, in place of those that are known.

    Raises:
        ValueError: an argument is not a plain value; or layers of a warehouse were taken out of the model.
    """
    base, known = _static(model)
    known = {key: value for key, value in (known if args is None else args).items() if key not in NOT_KEPT}
    for key, value in known.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{base} was built with {key}={value!r}, which is not a plain value: pass args={{{key!r}: ...}} with "
                f"one that means the same to timm, such as a name."
            ) from None
    return {"base": base, "args": known, **_dynamic(model)}


def build(description: Mapping[str, Any], static: nn.Module | None = None) -> nn.Module:
    """The model of a description, with initial weights.

    Args:
        static: the static model, if the base is None; it is converted in place.

    Raises:
        ValueError: the description has other keys or values than `describe` writes, its base is unknown to timm, or
            `static` does not have its layers.
    """
    _check_keys("the model", description, KEYS)
    model = _build_static(description) if static is None else static
    if "warehouses" in description:
        warehouses = _warehouses_of(description)
        settings = {one["name"]: _settings(one) for one in warehouses}
        try:
            return convert_as(model, {one["name"]: list(one["layers"]) for one in warehouses}, settings)
        except AttributeError as error:
            raise ValueError(f"this {type(model).__name__} lacks a layer that is dynamic: {error}") from None
    if "method" in description:
        missing = [key for key in ("n", "layers") if key not in description]
        if missing:
            raise ValueError(f"the model lacks {missing[0]!r}, with method {description['method']!r}")
        method, n, layers = (description[key] for key in ("method", "n", "layers"))
        chosen = description.get("settings", {})
        _check_keys(f"settings of method {method!r}", chosen, tuple(find(method).settings))
        return convert_to_baseline(model, method, n, layers, **chosen)
    without = [key for key in ("n", "layers", "settings") if key in description]
    if without:
        raise ValueError(f"the model has {without[0]!r}, but no method")
    return model


def _static(model: nn.Module) -> tuple[str | None, dict[str, Any]]:
    """timm's name of the model, or None, and its arguments."""
    cfg = getattr(model, "pretrained_cfg", None)
    base = cfg.get("architecture") if isinstance(cfg, Mapping) else None
    built = vars(model).get("kw_args")  # of `kw.create_model`; timm keeps them of others
    if not isinstance(base, str) or not timm.is_model(base):
        return None, {}
    timms = get_model_args(model)
    args = dict(timms if built is None else built)
    return base.removeprefix("kw_"), args | {key: timms[key] for key in CURRENT if key in timms}


def _build_static(description: Mapping[str, Any]) -> nn.Module:
    base, args = description.get("base"), dict(description.get("args", {}))
    if base is None:
        raise ValueError("timm did not build it: pass the static model, built by your code, as model=...")
    if not isinstance(base, str) or not timm.is_model(base) or base == NAME:
        raise ValueError(f"timm {timm.__version__} has no model {base!r}")
    kept = [key for key in NOT_KEPT if key in args]
    if kept:
        raise ValueError(f"the model's arguments have {kept[0]!r}, which a folder may not set")
    try:
        return BACKBONES.get(base, Backbone(base)).create(n=STATIC, **args)
    except (TypeError, RuntimeError, KeyError, AssertionError) as error:
        raise ValueError(f"timm {timm.__version__} cannot build {base} with {args}: {error}") from error


def _dynamic(model: nn.Module) -> dict[str, Any]:
    """Which layers are dynamic, and how."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DynamicLayer)}
    if not layers:
        return {}
    methods = {method for layer in layers.values() for method in _methods(layer)}
    if len(methods) != 1:
        raise ValueError(f"This {type(model).__name__} has layers of several methods: {', '.join(sorted(methods))}.")
    (method,) = methods
    if method == "kw":
        return {"warehouses": _warehouses(layers)}
    chosen = _chosen(method, list(layers.values()))
    n = max(getattr(layer, "n", 1) for layer in layers.values())
    return {"method": method, "n": n, "layers": list(layers), **({"settings": chosen} if chosen else {})}


def _methods(layer: DynamicLayer) -> list[str]:
    if isinstance(layer, KWLayer):
        return ["kw"]
    return [name for name, one in BASELINES.items() if type(layer) is one.layer] or [type(layer).__name__]


def _chosen(method: str, layers: Sequence[Any]) -> dict[str, str]:
    """The settings of the method that are not the usual ones, which are left out as in folders from before."""
    chosen = {}
    for key, values in (BASELINES[method].settings if method in BASELINES else {}).items():
        lacking = [type(layer).__name__ for layer in layers if not hasattr(layer, key)]
        if lacking:
            raise ValueError(
                f"{lacking[0]}, the layer of {method!r}, does not keep its setting {key!r} as an attribute."
            )
        found = sorted({getattr(layer, key) for layer in layers})
        if len(found) > 1:
            raise ValueError(f"This model has {method} layers of several settings: {key} is {' and '.join(found)}.")
        if found != [values[0]]:
            chosen[key] = found[0]
    return chosen


def _warehouses(layers: Mapping[str, Any]) -> list[dict[str, Any]]:
    names: dict[Any, list[str | None]] = {}
    for name, layer in layers.items():
        shares = layer.warehouse.shares
        found = names.setdefault(layer.warehouse, [None] * len(shares))
        found[next(k for k, share in enumerate(shares) if share is layer.share)] = name
    for warehouse, found in names.items():
        if None in found:
            gone = warehouse.shares[found.index(None)].kernel.name
            raise ValueError(
                f"Layer {gone!r} of warehouse {warehouse.name!r} was taken out of the model, which can only be built "
                f"again as a whole: save the complete model."
            )
    return [
        {"name": warehouse.name, "layers": found, "settings": plain_settings(warehouse.config)}
        for warehouse, found in names.items()
    ]


def plain_settings(config: KWConfig) -> dict[str, str]:
    return {field.name: str(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _warehouses_of(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The description's warehouses, checked for their keys and the types of their values."""
    found = description["warehouses"]
    if not isinstance(found, list):
        raise ValueError(f"warehouses is {found!r}, not a list")
    for k, one in enumerate(found):
        where = f"warehouses[{k}]"
        _check_keys(where, one, tuple(WAREHOUSE))
        for key, kind in WAREHOUSE.items():
            if key not in one:
                raise ValueError(f"{where} lacks {key!r}")
            if not isinstance(one[key], kind):
                raise ValueError(f"{where}.{key} is {one[key]!r}, not a {kind.__name__}")
        wrong = [layer for layer in one["layers"] if not isinstance(layer, str)]
        if wrong or not one["layers"]:
            raise ValueError(f"{where}.layers is {one['layers']!r}, not names of layers")
    names = [one["name"] for one in found]
    if len(set(names)) < len(names):
        raise ValueError(f"warehouses has two of the name {max(names, key=names.count)!r}")
    return found


def _settings(warehouse: Mapping[str, Any]) -> KWConfig:
    settings, known = warehouse["settings"], [field.name for field in dataclasses.fields(KWConfig)]
    _check_keys(f"settings of warehouse {warehouse['name']!r}", settings, known)
    try:
        return KWConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings of warehouse {warehouse['name']!r}: {error}") from None


def _check_keys(what: str, found: Any, known: Sequence[str]) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{what} is described by a {type(found).__name__}, not by keys")
    unknown = [key for key in found if key not in known]
    if unknown:
        raise ValueError(f"{what} has {unknown[0]!r}, which this version of kw does not know")
