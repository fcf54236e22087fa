"""Evaluation, in training or of a checkpoint. Every sample counts once, for any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kw
from kw.layers import KWLayer
from train.config import DataConfig, TrainConfig, load_saved, unused_in_evaluation
from train.data.formats import open_split
from train.data.loader import Batch, Samples, eval_loader
from train.data.transforms import eval_transform
from train.jobs.agreement import once_per_node
from train.jobs.checkpoints import State, newest_or_warn
from train.jobs.errors import CheckpointError, ConfigError, check, warn
from train.jobs.reading import FORMAT, read
from train.jobs.sweep import GROUP
from train.jobs.world import World
from train.model import build_model, load_weights

TOP = (1, 5)
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast to `runtime.precision`; off for float32."""
    dtype = PRECISIONS[config.runtime.precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], world: World, amp: contextlib.AbstractContextManager[object]
) -> dict[str, float]:
    """Accuracies in percent, mean cross entropy, and the number of samples. A collective.

    With fewer than five classes, top-5 is 100.

    Args:
        batches: this rank's share of the samples.
        amp: the context of the forward passes (`cast`).
    """
    training = model.training
    model.eval()
    totals = torch.zeros(2 + len(TOP), dtype=torch.float64, device=world.device)  # samples, loss, hits at 1 and 5
    for images, targets, _ in batches:
        images, targets = (t.to(world.device, non_blocking=True) for t in (images, targets))
        with amp:
            logits = model(images)
        logits = logits.float()
        ranks = logits.topk(min(max(TOP), logits.shape[1]), dim=1).indices == targets[:, None]
        hits = [ranks[:, :k].sum() for k in TOP]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        totals += torch.stack([torch.full_like(loss, len(targets)), loss, *hits]).double()
    model.train(training)
    samples, loss, *hits = world.sum(totals).tolist()
    percent = {f"top{k}": 100 * hit / samples for k, hit in zip(TOP, hits, strict=True)}
    return {**percent, "eval_loss": loss / samples, "eval_samples": round(samples)}


def evaluate_checkpoint(config: TrainConfig, typed: Sequence[str], world: World) -> dict[str, Any]:
    """Evaluate the checkpoint or run folder `config.evaluate`.

    Our checkpoints contain their config; the command line may change the data (`data_settings`) and the runtime. For a
    released checkpoint, all settings are the command line's. A moving average of the weights is evaluated too.

    Args:
        typed: the keys of the command line.

    Raises:
        CheckpointError: it cannot be read, or does not fit.
        ConfigError: the data set has other classes than the model, or the command line sets what the checkpoint has.
    """
    path = Path(str(config.evaluate)).expanduser()
    path, state = newest_or_warn(path / "checkpoints") if path.is_dir() else (path, read(path))
    ours = state.get("format") == FORMAT
    unused = [key for key in unused_in_evaluation(typed) if key != GROUP]
    if unused and not ours:
        warn(f"evaluate={config.evaluate} does not use {', '.join(unused)}.")
    if ours:
        saved = load_saved(state["config"])
        for key in typed:
            if not key.startswith(("data", "runtime", "evaluate", "freeze", "hydra", "logger")):
                raise ConfigError(
                    f"{path} is a checkpoint of {saved.name} and contains its settings: leave {key}=... out."
                )
        check(not unused, "evaluate", config.evaluate, f"an evaluation does not use {', '.join(unused)}: leave it out")
        saved.data = data_settings(saved.data, config.data, typed)
        saved.runtime, saved.evaluate, saved.freeze = config.runtime, config.evaluate, config.freeze
        config = saved
    images = once_per_node(world, lambda: open_split(config.data, config.data.eval_split))
    if ours and list(state["classes"]) != images.classes:
        raise ConfigError(
            f"{path} was trained on {len(state['classes'])} classes ({', '.join(state['classes'][:3])}, ...); "
            f"the data set {config.data.name!r} has {len(images.classes)} others: set data=... data.root=..."
        )
    samples = Samples(images, eval_transform(config.data, config.recipe), config.seed)
    batch = config.runtime.micro_batch or 256
    results: dict[str, Any] = {"checkpoint": str(path), "backbone": config.backbone.label, "n": config.n}
    results |= {"data": config.data.name, "root": config.data.root, "split": config.data.eval_split}
    results["image_size"] = config.data.image_size
    for prefix, weights in _weights(state, ours):
        model = _load(config, path, weights, len(images.classes), ours).to(world.device)
        if config.freeze is not None:
            results |= {"freeze": config.freeze, "megabytes": _freeze(model, config.freeze) / 1e6}
        pin = world.device.type == "cuda"
        loader = eval_loader(samples, batch, config.runtime.workers, pin, world.rank, world.size)
        found = evaluate(model, loader, world, cast(config, world.device))
        results |= {prefix + key: value for key, value in found.items()}
    return results


def data_settings(saved: DataConfig, composed: DataConfig, typed: Sequence[str]) -> DataConfig:
    """The data to evaluate on: as saved, except for the `data.*` keys of the command line. A group, data=..., replaces
    all but the size and normalization of the images, with which the model was trained.

    Args:
        typed: the keys of the command line.

    Raises:
        ConfigError: data.root is set for the digits, which are not in a folder.
    """
    group = "data" in typed
    kept = {"image_size", "mean", "std"} if group else {field.name for field in fields(DataConfig)}
    kept -= {key.removeprefix("data.") for key in typed}
    made = replace(composed, **{key: getattr(saved, key) for key in kept})
    if made.format == "digits" and "data.root" in typed:
        raise ConfigError(
            f"data.root={composed.root!r}: the digits are not in a folder. Say which data it is: data=folder ..."
        )
    return made


def _weights(state: State, ours: bool) -> list[tuple[str, State]]:
    if not ours:
        return [("", state)]
    return [("", state["model"]), *([("ema_", state["ema"])] if state["ema"] else [])]


def _load(config: TrainConfig, path: Path, weights: State, num_classes: int, ours: bool) -> nn.Module:
    model = build_model(config, num_classes)
    try:
        if ours:
            load_weights(model, weights)
        else:
            kw.load_released(model, weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit {config.backbone.label} at n={config.n}: {error}") from None
    return model


def _freeze(model: nn.Module, cells: str) -> int:
    """Freeze the model; returns its bytes."""
    dynamic = any(isinstance(module, KWLayer) for module in model.modules())
    check(dynamic, "freeze", cells, "the model has no KernelWarehouse layer (static, or another method): leave it out")
    dtype = None if cells == "float32" else getattr(torch, cells)
    try:
        return kw.freeze(model, dtype=dtype).bytes
    except ValueError as error:
        raise ConfigError(f"freeze={cells}: {error}") from None
