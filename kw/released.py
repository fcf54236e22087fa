"""State dicts of the released code to ours and back. No other file knows the released names and shapes.

The release stores cells as `warehouse_manager.weights.{k}` of shape `(n, o, i, 1, 1)`, numbered by their first use in
its module order. It names layers as torchvision and the ConvNeXt authors do, and does not save the temperature.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kw.baselines import fdconv
from kw.config import CHOICES
from kw.frozen import refuse_frozen
from kw.layers import DynamicLayer, KWLayer, KWLinear
from kw.temperature import set_temperature


class Entry(NamedTuple):
    """One entry of a state dict: its name here, its name and shape in the release."""

    name: str
    released_name: str
    released_shape: tuple[int, ...]


@dataclass(frozen=True)
class ReleasedFormat:
    """How the release writes one family of backbones.

    Args:
        rename: from a model, its modules' names to the release's.
        first: beginning of the released names that its module order puts before all others.
        linear_dims: spatial dimensions of the convolutions that the release has in place of our linear layers.
    """

    rename: Callable[[nn.Module], dict[str, str]]
    first: str = ""
    linear_dims: int = 2


def load_released(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Load a released-format state dict into a backbone, strictly, and return the model.

    Args:
        model: one of `kw.backbones`, at the checkpoint's budget; a vanilla one loads vanilla checkpoints. Or any model
            with FDConv's layers (`kw.baselines.fdconv.load_released`).
        state_dict: entries, or a checkpoint that holds them under `"model"` or `"state_dict"`.

    The temperature becomes 0, as in a trained model. After an error the model is unchanged.

    Raises:
        ValueError: entries are missing, left over or of another shape (the message names them), the model is of a
            family that was not released, or it has a method or settings that the release does not have.
    """
    refuse_frozen(model, "lacks parts that a released model has")
    values = unwrap(state_dict)
    if _is_fdconv(model):
        fdconv.load_released(model, values)
        return model
    _refuse_unpublished(model)
    entries = _entries(model)
    fit = "Is it of this backbone, at this n and number of classes?"
    missing = [entry.released_name for entry in entries if entry.released_name not in values]
    left_over = sorted(set(values) - {entry.released_name for entry in entries})
    if missing or left_over:
        raise ValueError(
            f"The state dict does not fit this {type(model).__name__}: {len(missing)} missing ({_some(missing)}), "
            f"{len(left_over)} left over ({_some(left_over)}). {fit}"
        )
    own = model.state_dict()
    loaded = {}
    for name, released_name, shape in entries:
        value = torch.as_tensor(values[released_name])
        if tuple(value.shape) != shape:
            raise ValueError(f"{released_name!r} has shape {tuple(value.shape)}, where {shape} is needed. {fit}")
        loaded[name] = value.reshape(own[name].shape)
    model.load_state_dict(loaded, strict=False)  # complete but for the temperature, which the release does not save
    if any(isinstance(module, KWLayer) for module in model.modules()):
        set_temperature(model, 0)
    return model


def to_released(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict in the released format, which leaves out the temperature.

    Raises:
        ValueError: the model is of a family that was not released, or it has a method or settings that the release does
            not have.
    """
    refuse_frozen(model, "lacks parts that a released model has")
    if _is_fdconv(model):
        return fdconv.to_released(model)
    _refuse_unpublished(model)
    own = model.state_dict()
    return {released_name: own[name].reshape(shape) for name, released_name, shape in _entries(model)}


def _entries(model: nn.Module) -> list[Entry]:
    """All entries of the model's state dict that the release saves."""
    released = _format_of(model)
    renamed = released.rename(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KWLayer)}
    cells: dict[str, tuple[int, int]] = {}  # warehouse -> its number and spatial dimensions in the release
    for name in sorted(layers, key=lambda name: not _comes_first(renamed[name], released)):  # the release's order
        dims = released.linear_dims if isinstance(layers[name], KWLinear) else 2
        cells.setdefault(layers[name].warehouse.name, (len(cells), dims))
    entries = []
    for name, value in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        shape = tuple(value.shape)
        if module.endswith(".warehouse"):
            number, dims = cells[layers[module.removesuffix(".warehouse")].warehouse.name]
            entries.append(Entry(name, f"warehouse_manager.weights.{number}", shape + (1,) * dims))
        elif leaf == "gamma":  # layer scale
            entries.append(Entry(name, f"{renamed[module]}.{leaf}", (1, *shape, 1, 1)))
        elif leaf != "temperature":
            entries.append(Entry(name, f"{renamed[module]}.{leaf}", shape))
    return entries


def _is_fdconv(model: nn.Module) -> bool:
    return any(isinstance(module, fdconv.FDConv2d) for module in model.modules())


def _refuse_unpublished(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, DynamicLayer) and not isinstance(layer, KWLayer):
            raise ValueError(
                f"This {type(model).__name__} has layers of another method ({type(layer).__name__}), and only "
                f"KernelWarehouse and FDConv have a released format: build it with dynamic='kw' or 'fdconv'."
            )
        if isinstance(layer, KWLayer):
            for key in ("attention_function", "anchoring", "sharing", "partition"):
                value, published = getattr(layer.warehouse.config, key), CHOICES[key][0]
                if value != published:
                    raise ValueError(
                        f"Layer {layer.layer_name!r} has {key}={value!r}, and all released checkpoints have "
                        f"{key}={published!r}. Use the model's own state_dict for such a model."
                    )


def _comes_first(released_name: str, released: ReleasedFormat) -> bool:
    return bool(released.first) and released_name.startswith(released.first)


def _format_of(model: nn.Module) -> ReleasedFormat:
    architecture = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture"))
    for family, released in FORMATS.items():
        if architecture.startswith(family):
            return released
    raise ValueError(
        f"No released format is known for {architecture!r} ({type(model).__name__}): "
        f"there is one for {', '.join(FORMATS)}."
    )


def unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of a checkpoint that may hold them under "model" or "state_dict", without DataParallel's prefix.

    Raises:
        ValueError: a key is not a string.
    """
    for key in ("model", "state_dict"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    other = next((name for name in state_dict if not isinstance(name, str)), None)
    if other is not None:
        raise ValueError(f"The state dict has the key {other!r}, which is no name of a parameter.")
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"


def _rename_by(rules: list[tuple[str, str]]) -> Callable[[nn.Module], dict[str, str]]:
    def rename(model: nn.Module) -> dict[str, str]:
        names = {}
        for name, _ in model.named_modules():
            renamed = name
            for pattern, theirs in rules:
                renamed = re.sub(pattern, theirs, renamed)
            names[name] = renamed
        return names

    return rename


ATTENTION = (r"\.attention\.norm$", ".attention.norm1")


def _rename_mobilenetv2(model: nn.Module) -> dict[str, str]:
    """torchvision's names: one list `features` of stem, blocks and head; in a block, `conv.{k}` by position."""
    numbers: dict[str, int] = {}
    names = {}
    for name, _ in model.named_modules():
        match = re.match(r"(blocks\.\d+\.\d+)\.?(.*)", name)
        if match is None:
            names[name] = name
            continue
        block, child = match.groups()
        number = numbers.setdefault(block, len(numbers) + 1)
        own, _, rest = child.partition(".")
        places = EXPANDED if hasattr(model.get_submodule(block), "conv_pwl") else PLAIN
        names[name] = f"features.{number}.conv.{places.get(own, own)}" + (f".{rest}" if rest else "")
    head = len(numbers) + 1
    places = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    places |= {"conv_head": f"features.{head}.0", "bn2": f"features.{head}.1"}
    if isinstance(model.get_submodule("classifier"), KWLinear):
        places["classifier"] = "classifier.1.conv"
    for name in names:
        own, _, rest = name.partition(".")
        if own in places:
            names[name] = places[own] + (f".{rest}" if rest else "")
    return {name: re.sub(*ATTENTION, renamed) for name, renamed in names.items()}


EXPANDED = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
PLAIN = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}  # the first block, which does not expand

FORMATS = {
    "resnet": ReleasedFormat(_rename_by([ATTENTION])),
    "mobilenetv2": ReleasedFormat(_rename_mobilenetv2, linear_dims=1),
    "convnext": ReleasedFormat(
        _rename_by(
            [
                (r"^stem\.", "downsample_layers.0."),
                (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
                (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
                (r"\.conv_dw", ".dwconv"),
                (r"\.mlp\.fc1", ".pwconv1"),
                (r"\.mlp\.fc2", ".pwconv2"),
                (r"^head\.norm", "norm"),
                (r"^head\.fc", "head"),
                ATTENTION,
            ]
        ),
        first="downsample_layers",
    ),
}
