"""Sharing: merge and split the scope's warehouses as `KWConfig.sharing` and `partition` say (the paper's ablations of
the sharing range and of the kernel partition). The scope has one warehouse per stage, as published.

sharing:
    stage   the scope's warehouses
    none    one for each layer
    kind    within a warehouse of the scope, one for each kind of layer: equal in `kw.scope.kind_of` and kernel size
    model   warehouses of the scope that have a kind of layer in common become one. This merges stages, while depthwise
            and dense kernels stay apart as in the scope: no cell could fit both.

partition, after that: cells that span all positions need kernels of one size ("channel"), and cells that are complete
kernels need kernels of one shape ("none"). A warehouse with several is split.

A warehouse that does not change keeps its name.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from kw.config import KWConfig
from kw.scope import kind_of
from kw.warehouse import Warehouses

Groups = dict[str, list[str]]  # warehouse name -> names of its layers, both in module order


def regroup(
    model: nn.Module, scope_groups: Groups, configs: Mapping[str, KWConfig]
) -> tuple[Groups, dict[str, KWConfig]]:
    """The warehouses to build, and the settings of each.

    Args:
        model: still vanilla.
        scope_groups: the scope's warehouses.
        configs: warehouse name of the scope -> its settings.

    Raises:
        ValueError: warehouses with different settings would become one.
    """
    joined = _join(model, scope_groups, configs)
    source = {layer: warehouse for warehouse, layers in scope_groups.items() for layer in layers}
    groups: dict[tuple[str, str], list[str]] = {}  # (joined warehouse, what its layers must have in common) -> layers
    for name, _ in model.named_modules():
        if name in source:
            groups.setdefault((joined[source[name]], _alike(model, name, configs[source[name]])), []).append(name)
    regrouped: Groups = {}
    settings: dict[str, KWConfig] = {}
    for (warehouse, alike), layers in groups.items():
        split = sum(other == warehouse for other, _ in groups) > 1
        name = f"{warehouse}_{alike}".replace(".", "_") if split else warehouse
        while (split and name in scope_groups) or name in regrouped or hasattr(Warehouses, name):
            name += "_"
        regrouped[name] = layers
        settings[name] = _one_config([source[layer] for layer in layers], layers, configs)
    return regrouped, settings


def _alike(model: nn.Module, name: str, config: KWConfig) -> str:
    """A word that layers must have in common to stay in one warehouse of the scope."""
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


def _join(model: nn.Module, scope_groups: Groups, configs: Mapping[str, KWConfig]) -> dict[str, str]:
    """Warehouse of the scope -> the warehouse that it is merged into: itself, or with sharing="model" one for all that
    have layers of one kind."""
    merged: list[tuple[set[str], list[str]]] = []  # kinds of layers, and the warehouses that have them
    names = {warehouse: warehouse for warehouse in scope_groups}
    for warehouse, layers in scope_groups.items():
        if configs[warehouse].sharing != "model":
            continue
        kinds = {_kind(model, name) for name in layers}
        met = [other for other in merged if other[0] & kinds]
        merged = [other for other in merged if not other[0] & kinds]
        merged.append(
            (kinds.union(*(k for k, _ in met)), [*(name for _, members in met for name in members), warehouse])
        )
    for _, members in merged:
        if len(members) > 1:
            names |= dict.fromkeys(members, f"{members[0]}_to_{members[-1]}")
    return names


def _one_config(sources: list[str], layers: list[str], configs: Mapping[str, KWConfig]) -> KWConfig:
    """The settings that all these warehouses of the scope have in common."""
    config = configs[sources[0]]
    for source, layer in zip(sources, layers, strict=True):
        if configs[source] != config:
            raise ValueError(
                f"sharing='model' merges warehouses {sources[0]!r} (layer {layers[0]!r}) and {source!r} (layer "
                f"{layer!r}), but their settings differ: {config} and {configs[source]}. Use the same settings, or "
                f"sharing='stage'."
            )
    return config
