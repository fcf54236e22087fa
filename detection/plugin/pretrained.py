"""Classification checkpoints for backbones: of `python -m train`, of the authors' release, or timm's own."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from safetensors.torch import load_file
from torch import nn

import kw
from detection.plugin.errors import PretrainedError, SettingError
from kw.description import describe
from kw.folder import FolderError, read
from kw.released import unwrap

KEYS = {"type", "checkpoint", "num_classes", "ema", "static"}
OURS = {"model", "ema", "classes", "config"}  # keys of a checkpoint of `python -m train`
IMAGENET = 1000


def load_classifier(backbone: nn.Module, build: Callable[..., nn.Module], init_cfg: Mapping[str, Any]) -> None:
    """Fill a backbone from a checkpoint of the complete classification model. On an error it is left unchanged.

    The checkpoint is loaded into a classification model first, which must take all of it. What the backbone does not
    have, the classifier and all else that follows its last feature map, is left out, and the log names it.

    Args:
        backbone: a timm model, static or dynamic, without what follows its last feature map.
        build: builds the complete model for a number of classes, `num_classes=...`; with `static=True` the static one.
        init_cfg: `checkpoint`, a .pt, .pth or .safetensors file, or a model folder (`kw.save`). `num_classes` of a file
            that is not of `python -m train`, 1000 by default. `ema=True` for the averaged weights of a checkpoint of
            `python -m train`. `static=True` for one of the static model, from which a dynamic backbone starts
            (`kw.load_static`).

    Raises:
        SettingError: init_cfg has other keys.
        PretrainedError: the file cannot be read, or does not fit; the message names what is missing or left over.
    """
    if set(init_cfg) - KEYS or init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint"):
        raise SettingError(
            f"init_cfg={dict(init_cfg)}: KWBackbone takes type='Pretrained', checkpoint=PATH, "
            f"and if needed num_classes=NUMBER, ema=True and static=True."
        )
    path = Path(init_cfg["checkpoint"]).expanduser()
    folder, static = path.is_dir(), init_cfg.get("static", False)
    state = _of_folder(path) if folder else read_weights(path)
    ours = state.keys() >= OURS
    classes = len(state["classes"]) if ours or folder else init_cfg.get("num_classes", IMAGENET)
    classifier = build(num_classes=classes, static=static)
    try:
        if folder:
            _check_settings(classifier, state["description"])
        weights = _weights_of_run(state, path, init_cfg.get("ema", False)) if ours else unwrap(state)
        if ours or folder or weights.keys() == classifier.state_dict().keys():
            load_strictly(classifier, weights)
        else:
            kw.load_released(classifier, weights)
        if static:
            weights, classifier = classifier.state_dict(), build(num_classes=classes, static=False)
            kw.load_static(classifier, weights)
    except (ValueError, RuntimeError) as error:
        run = f" It is of the run {state['config'].get('name')}." if ours else ""
        raise PretrainedError(f"{path} does not fit this backbone with {classes} classes: {error}{run}") from None
    loaded, wanted = classifier.state_dict(), backbone.state_dict()
    load_strictly(backbone, {name: value for name, value in loaded.items() if name in wanted})
    if kw.temperatures(backbone):
        kw.set_temperature(backbone, 0)
    left_out = sorted(loaded.keys() - wanted.keys())
    print_log(f"{path}: loaded, except for what follows the last feature map: {', '.join(left_out)}", "current")


def _of_folder(path: Path) -> dict[str, Any]:
    """A model folder, by the keys of a run's checkpoint, and its description. Raises PretrainedError."""
    try:
        model, contents = kw.load(path), read(path)
    except FolderError as error:
        raise PretrainedError(str(error)) from None
    return {"model": model.state_dict(), "classes": range(contents.num_classes), "description": contents.description}


def _check_settings(classifier: nn.Module, folders: Mapping[str, Any]) -> None:
    """Raises ValueError if the folder's model has other warehouses: shapes do not show every setting."""
    own = describe(classifier)
    for key in ("base", "warehouses"):
        if own.get(key) != folders.get(key):
            mine, theirs = (one.get("base") if key == "base" else _budgets(one) for one in (own, folders))
            raise ValueError(f"the folder's model is {theirs}, and this backbone {mine}.")


def _budgets(description: Mapping[str, Any]) -> str:
    found = {(one["name"], tuple(one["settings"].items())) for one in description.get("warehouses", ())}
    return "; ".join(f"{name} ({', '.join(f'{k}={v}' for k, v in one)})" for name, one in sorted(found)) or "static"


def read_weights(path: Path) -> dict[str, Any]:
    """Read a checkpoint as tensors and plain values, to the CPU; nothing else that it holds is run.

    Raises:
        PretrainedError: the file cannot be read so.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script saves its arguments
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PretrainedError(f"{path} does not exist.") from None
    except pickle.UnpicklingError:
        raise PretrainedError(
            f"{path} is damaged, or holds more than tensors and plain values: {_asked_for(path)}."
        ) from None
    except Exception as error:  # torch and safetensors raise many kinds
        raise PretrainedError(f"{path} is damaged, or not a checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise PretrainedError(f"{path} holds a {type(state).__name__}, not a checkpoint.")
    return state


def _asked_for(path: Path) -> str:
    try:
        functions = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # damaged, or of an old format
        functions = []
    return f"it asks for {', '.join(sorted(functions))}, which was not run" if functions else "nothing in it was run"


def load_strictly(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Raises ValueError naming entries that are missing, left over or of another shape; the model is then unchanged."""
    own = model.state_dict()
    wrong = {
        "missing": own.keys() - values.keys(),
        "left over": values.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & values.keys() if own[name].shape != values[name].shape},
    }
    if any(wrong.values()):
        listed = [f"{len(names)} {how} ({', '.join(sorted(names)[:8])})" for how, names in wrong.items() if names]
        raise ValueError("; ".join(listed) + ".")
    model.load_state_dict(dict(values))


def _weights_of_run(state: Mapping[str, Any], path: Path, ema: bool) -> Mapping[str, Any]:
    weights = state["ema" if ema else "model"]
    if weights is None:
        raise PretrainedError(f"{path} has no averaged weights: leave init_cfg.ema out.")
    return dict(weights)
