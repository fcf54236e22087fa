"""A finished run in one dictionary: `summary.json`."""

from __future__ import annotations

from statistics import median
from typing import Any

from torch import nn

import kw
from train.config import TrainConfig
from train.jobs.metrics import devices
from train.jobs.provenance import provenance


def summarize(
    config: TrainConfig, model: nn.Module, lines: list[dict[str, Any]], unsaid: str = "unknown"
) -> dict[str, Any]:
    """What was trained, how well it ended, and what it costs.

    Args:
        lines: of metrics.jsonl, at least one.
        unsaid: the device of lines that do not say theirs, which older versions wrote.
    """
    last = lines[-1]
    size = (3, config.data.image_size, config.data.image_size)
    costs = kw.profile(model, size)
    return {
        "name": config.name,
        "backbone": config.backbone.label,
        "dynamic": config.dynamic,
        "n": config.n,
        "data": config.data.name,
        **{key: last[key] for key in ("top1", "top5", "ema_top1", "ema_top5") if key in last},
        "best_top1": max(score(line) for line in lines),
        "eval_samples": last["eval_samples"],
        "epochs": len(lines),
        "params": costs.params,
        "macs": costs.macs,
        "images_per_second": median(line["images_per_second"] for line in lines),
        "seed": config.seed,
        "device": devices(lines, unsaid),
        "devices": config.runtime.devices * config.runtime.nodes,
        **provenance(),
    }


def score(line: dict[str, Any]) -> float:
    """What the best epoch is chosen by: top-1 accuracy, of the moving average if there is one."""
    return float(line.get("ema_top1", line["top1"]))
