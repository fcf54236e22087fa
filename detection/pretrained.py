"""Classification checkpoints into backbones, strictly: of `python -m train`, released ones, or timm's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import kw
from kw.layers import KWLayer
from train.jobs.checkpoint import FORMAT, read
from train.jobs.errors import CheckpointError, ConfigError

KEYS = {"type", "checkpoint", "num_classes", "ema"}
IMAGENET = 1000


def load_classifier(backbone: nn.Module, build: Callable[..., nn.Module], init_cfg: Mapping[str, Any]) -> None:
    """Fill a backbone from a checkpoint of the whole classification model. On an error it is as it was.

    The checkpoint goes into a classification model first, which must take all of it; the classifier, and what else the
    backbone has cut off behind its last feature map, is left out, by name in the log.

    Args:
        backbone: a timm model, maybe converted, cut off behind its last feature map.
        build: builds the whole model for a number of classes, `num_classes=...`.
        init_cfg: `checkpoint`, a .pt, .pth or .safetensors file; `num_classes` of one that is not ours (1000);
            `ema=True` for the average of the weights that a run of ours saved.

    Raises:
        ConfigError: init_cfg has other keys.
        CheckpointError: the file cannot be read, or does not fit; the message names what is missing or left over.
    """
    if set(init_cfg) - KEYS or init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint"):
        raise ConfigError(
            f"init_cfg={dict(init_cfg)}: KWBackbone takes type='Pretrained', checkpoint=PATH, "
            f"and where they are needed num_classes=NUMBER, ema=True."
        )
    path = Path(init_cfg["checkpoint"]).expanduser()
    state = read_weights(path)
    ours = state.get("format") == FORMAT
    classes = len(state["classes"]) if ours else init_cfg.get("num_classes", IMAGENET)
    whole = build(num_classes=classes)
    try:
        if ours:
            load_strictly(whole, _own_weights(state, path, init_cfg.get("ema", False)))
        elif set(state) == set(whole.state_dict()):
            load_strictly(whole, state)
        else:
            kw.load_released(whole, state)
    except (ValueError, RuntimeError) as error:
        of = f" It is of {state['config']['name']}." if ours else ""
        raise CheckpointError(f"{path} does not fit this backbone with {classes} classes: {error}{of}") from None
    loaded, wanted = whole.state_dict(), backbone.state_dict()
    load_strictly(backbone, {name: value for name, value in loaded.items() if name in wanted})
    if any(isinstance(module, KWLayer) for module in backbone.modules()):
        kw.set_temperature(backbone, 0)
    left_out = sorted(set(loaded) - set(wanted))
    print_log(f"{path}: loaded, but for what lies behind the last feature map: {', '.join(left_out)}", "current")


def read_weights(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; nothing in it is run.

    Raises:
        CheckpointError: it cannot be read.
    """
    if path.suffix != ".safetensors":
        return read(path)
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None


def load_strictly(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Raises ValueError naming entries that are missing, left over or of another shape; the model is then unchanged."""
    own = model.state_dict()
    wrong = {
        "missing": own.keys() - values.keys(),
        "left over": values.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & values.keys() if own[name].shape != values[name].shape},
    }
    if any(wrong.values()):
        told = [f"{len(names)} {how} ({', '.join(sorted(names)[:8])})" for how, names in wrong.items() if names]
        raise ValueError("; ".join(told) + ".")
    model.load_state_dict(dict(values))


def _own_weights(state: Mapping[str, Any], path: Path, ema: bool) -> Mapping[str, Any]:
    weights = state["ema" if ema else "model"]
    if weights is None:
        raise CheckpointError(f"{path} has no average of the weights: leave init_cfg.ema out.")
    return dict(weights)
