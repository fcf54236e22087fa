"""Sharing: from the scope's warehouses, one per stage as published, to those that `KWConfig.sharing` and `partition`
ask for (the paper's ablations of the sharing range and of the kernel partition).

sharing:
    stage   the scope's
    none    one for each layer
    kind    within a warehouse of the scope, one for each kind of layer: alike in `kw.scope.kind_of` and kernel size
    model   those of the scope that have layers of one kind become one, with all that is in them. Stages so become one,
            while depthwise and dense kernels, which no cell could be cut from alike, stay apart as the scope has them.

partition, after that: cells that span all positions are for kernels of one size ("channel"), whole kernels for kernels
of one shape ("none"). Where a warehouse has several, it is split.

A warehouse that stays as it is keeps its name.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from kw.config import KWConfig
from kw.scope import kind_of
from kw.warehouse import Warehouses

Drawing = dict[str, list[str]]  # warehouse name -> names of its layers, both in module order


def regroup(model: nn.Module, drawing: Drawing, configs: Mapping[str, KWConfig]) -> tuple[Drawing, dict[str, KWConfig]]:
    """The warehouses to build in place of the scope's, and the settings of each.

    Args:
        model: still vanilla.
        drawing: the scope's.
        configs: warehouse name of the scope -> its settings.

    Raises:
        ValueError: warehouses whose settings differ would become one.
    """
    joined = _join(model, drawing, configs)
    source = {layer: warehouse for warehouse, layers in drawing.items() for layer in layers}
    groups: dict[tuple[str, str], list[str]] = {}  # (joined warehouse, what its layers must have in common) -> layers
    for name, _ in model.named_modules():
        if name in source:
            groups.setdefault((joined[source[name]], _alike(model, name, configs[source[name]])), []).append(name)
    regrouped: Drawing = {}
    settings: dict[str, KWConfig] = {}
    for (warehouse, alike), layers in groups.items():
        split = sum(other == warehouse for other, _ in groups) > 1
        name = f"{warehouse}_{alike}".replace(".", "_") if split else warehouse
        while (split and name in drawing) or name in regrouped or hasattr(Warehouses, name):
            name += "_"
        regrouped[name] = layers
        settings[name] = _one_config([source[layer] for layer in layers], layers, configs)
    return regrouped, settings


def _alike(model: nn.Module, name: str, config: KWConfig) -> str:
    """What layers of a warehouse must have in common, beside what the scope says, in a word."""
    if config.sharing == "none":
        return name
    words = []
    shape = model.get_parameter(f"{name}.weight").shape
    if config.sharing == "kind":
        words.append(_kind(model, name))
    if config.partition != "spatial_channel":
        words.append("x".join(map(str, shape if config.partition == "none" else shape[2:])) or "linear")
    return "_".join(words)


def _kind(model: nn.Module, name: str) -> str:
    """`conv3x3`, `depthwise7x7`, `linear`."""
    size = model.get_parameter(f"{name}.weight").shape[2:]
    return kind_of(model.get_submodule(name)) + "x".join(map(str, size))


def _join(model: nn.Module, drawing: Drawing, configs: Mapping[str, KWConfig]) -> dict[str, str]:
    """The name of what each warehouse of the scope becomes a part of: itself, or with sharing="model" all that have
    layers of one kind."""
    whole: list[tuple[set[str], list[str]]] = []  # kinds of layers, and the warehouses that have them
    names = {warehouse: warehouse for warehouse in drawing}
    for warehouse, layers in drawing.items():
        if configs[warehouse].sharing != "model":
            continue
        kinds = {_kind(model, name) for name in layers}
        met = [other for other in whole if other[0] & kinds]
        whole = [other for other in whole if not other[0] & kinds]
        whole.append(
            (kinds.union(*(k for k, _ in met)), [*(name for _, members in met for name in members), warehouse])
        )
    for _, members in whole:
        if len(members) > 1:
            names |= dict.fromkeys(members, f"{members[0]}_to_{members[-1]}")
    return names


def _one_config(sources: list[str], layers: list[str], configs: Mapping[str, KWConfig]) -> KWConfig:
    """The settings that all these warehouses of the scope have."""
    config = configs[sources[0]]
    for source, layer in zip(sources, layers, strict=True):
        if configs[source] != config:
            raise ValueError(
                f"sharing='model' makes one warehouse of {sources[0]!r} (layer {layers[0]!r}) and {source!r} (layer "
                f"{layer!r}), but their settings differ: {config} and {configs[source]}. Give them the same, or keep "
                f"sharing='stage'."
            )
    return config
