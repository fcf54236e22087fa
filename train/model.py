"""The model of a run: a backbone of kw or any other timm model, with the dynamic layers of the config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.layers import DropPath
from torch import Tensor, nn

import kw
from train.config import TrainConfig
from train.jobs.checkpoints import newest_or_warn
from train.jobs.errors import CheckpointError, ConfigError
from train.jobs.reading import read


def build_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """Build the model, with cells and attentions at their initial values.

    Raises:
        ConfigError: timm does not accept `backbone.kwargs`, or the kernels cannot be cut into such cells.
    """
    name = config.backbone.name
    kwargs: dict[str, Any] = {"num_classes": num_classes, "drop_rate": config.recipe.dropout}
    if config.recipe.drop_path > 0:
        kwargs["drop_path_rate"] = config.recipe.drop_path
    pretrained = timm.get_pretrained_cfg(name)
    if pretrained and pretrained.fixed_input_size:  # transformers: the position embeddings depend on it
        kwargs["img_size"] = config.data.image_size
    kwargs |= config.backbone.kwargs
    settings = config.kw.changes()
    try:
        model = kw.create_model(name, n=config.n, dynamic=config.dynamic, **settings, **kwargs)
    except (TypeError, ValueError) as error:
        more = config.backbone.kwargs
        source = f" backbone.kwargs={more} come from the group backbone=...; backbone=timm has none." if more else ""
        wanted = f"backbone={name} cannot be built at n={config.n}, dynamic={config.dynamic}"
        raise ConfigError(f"{wanted}: {str(error).removesuffix('.')}.{source}") from error
    if config.recipe.drop_path_rule:
        set_drop_path(model, config.recipe.drop_path, config.recipe.drop_path_rule)
    return model


def set_drop_path(model: nn.Module, rate: float, rule: str) -> None:
    """Drop residual branches at `rate` in every block, or (`linear`) at a rate that rises from 0 in the first block to
    `rate` in the last.

    Raises:
        ConfigError: the model has none of timm's residual blocks.
    """
    # timm's blocks have `drop_path`, or `drop_path1` and `drop_path2`, at any rate.
    slots = [[key for key in ("drop_path", "drop_path1", "drop_path2") if hasattr(m, key)] for m in model.modules()]
    blocks = [(block, keys) for block, keys in zip(model.modules(), slots, strict=True) if keys]
    if not blocks:
        raise ConfigError(
            f"recipe.drop_path_rule={rule}: this {type(model).__name__} has none of timm's residual blocks."
        )
    for index, (block, keys) in enumerate(blocks):
        share = 1.0 if rule == "constant" else index / max(len(blocks) - 1, 1)
        for key in keys:
            setattr(block, key, DropPath(rate * share))


def start_from(model: nn.Module, path: Path) -> None:
    """Load the weights of a static run or checkpoint into `model`, which has the same backbone: static, of
    KernelWarehouse with n of at least 1, or of FDConv (`kw.load_static`).

    Args:
        path: a run folder or a file: a checkpoint of a run, a state dict, or one under `"model"` or `"state_dict"`.

    Raises:
        CheckpointError: it cannot be read, or does not fit.
    """
    path = path.expanduser()
    path, state = newest_or_warn(path / "checkpoints") if path.is_dir() else (path, read(path))
    weights = next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), state)
    others = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"start_from={path} is no state dict: {others[0]!r} in it is no tensor.")
    try:
        kw.load_static(model, weights)
    except ValueError as error:
        raise CheckpointError(f"start_from={path} does not fit: {error}") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict, strictly.

    Raises:
        ValueError: it was written when cells had names of their own, not yet those of their layers.
        RuntimeError: it does not fit.
    """
    if any(name.startswith("warehouses.") for name in weights):
        raise ValueError(
            "it is of an earlier version, in which cells were saved as 'warehouses.*' and not with their layers; "
            "it can only be read by that version"
        )
    model.load_state_dict(weights)
