"""A training step of a detector, for `scripts.bench.step_time`: that of a file in detection/configs/, with its batch of
images at the largest size that the files train at, so that hours and memory are upper bounds."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope

from detection.compose import find
from detection.run import calm
from scripts.bench.detection import train
from scripts.bench.memory import free, peak, reset_peak
from scripts.bench.timing import in_turns, medians, rounded

LARGEST = (800, 1333)


def measure(name: str, device: str, repeats: int, size: tuple[int, int] = LARGEST) -> dict[str, Any]:
    """Images per second and memory of forward and backward pass; the update is small beside them."""
    calm()
    init_default_scope("mmdet")
    cfg = Config.fromfile(find(name))
    free()
    reset_peak(device)
    model, batch = MODELS.build(cfg.model).to(device), cfg.train_dataloader.batch_size
    torch.manual_seed(0)
    images = demo_mm_inputs(batch, [[3, *size]] * batch, num_classes=80, with_mask=True)
    (seconds,) = medians(in_turns({name: partial(train, model, images)}, repeats, warm_up=1))
    return {"images_per_second": rounded(batch / seconds), "memory_gb": round(peak(device) / 1e9, 3),
            "micro_batch": batch, "precision": "float32", "repeats": repeats}  # fmt: skip
