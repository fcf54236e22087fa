"""How fast this machine trains the ImageNet rows, and in how much memory: the report's costs of rows that were not run
come from it.

    python -m scripts.bench.step_time rows=all                        every row, on the GPU if there is one
    python -m scripts.bench.step_time rows=resnet18_kw1d4x,resnet50 runtime.precision=bfloat16 runtime.micro_batch=128

rows       names of rows; all: those on ImageNet; coco: detectors, which need `make setup-detection`
repeats    micro-batches that are timed, after two to warm up
out        the file that the lines are appended to; the report reads it, and takes the last line of a row

Other keys are those of `python -m train`; detectors take runtime.device alone. Model, optimizer, loss and mixup are the
row's own; images are random numbers in memory, so loading is not counted. A batch consists of micro-batches, of which a
few are timed, and of one step of the optimizer. Memory is the peak of what tensors take on a GPU, and of the process on
a CPU.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.bench.machine import machine_name
from scripts.bench.memory import free, peak, reset_peak
from scripts.bench.timing import in_turns, medians, rounded
from scripts.options import one_line_errors, parse
from scripts.report.published import CLASSIFICATION, DETECTION, Published, published
from scripts.report.steps import STEPS
from train.config import TrainConfig, compose
from train.evaluate import cast
from train.jobs.errors import ConfigError
from train.jobs.provenance import provenance
from train.jobs.world import connect
from train.model import build_model
from train.optim import build_loss, build_mixup, build_optimizer

CLASSES = 1000
MICRO_BATCH = {"cpu": 8, "cuda": 64}


@dataclass
class Options:
    rows: str = ""
    repeats: int = 3
    out: str = str(STEPS)


def rows_of(names: str) -> list[str]:
    """Raises ConfigError naming the unknown ones."""
    groups = {"all": CLASSIFICATION, "coco": DETECTION}
    rows = {row.id: row.task for row in published() if row.has_code}
    known = list(rows)
    task = groups.get(names)
    chosen = [name for name in known if rows[name] == task] if task else [name for name in names.split(",") if name]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        problem = f"there is no {', '.join(unknown)}" if unknown else "must name rows"
        raise ConfigError(f"rows={names}: {problem}. Rows are all, coco, {', '.join(known)}")
    return chosen


def composed(row: str, overrides: list[str]) -> TrainConfig:
    own = next(known.overrides for known in published() if known.id == row)
    return compose([*own, "data.root=unused", *overrides])


def measure(row: str, overrides: list[str], repeats: int) -> dict[str, Any]:
    """Images per second of training and memory, as a line of the report's file."""
    known = next(one for one in published() if one.id == row)
    if known.task == DETECTION:
        return measure_detector(known, overrides, repeats)
    config = composed(row, overrides)
    device = connect(config.runtime).device
    micro = config.runtime.micro_batch or MICRO_BATCH[device.type]
    size = config.data.image_size
    free()
    reset_peak(device.type)
    model = build_model(config, CLASSES).to(device).train()
    optimizer, mixup = build_optimizer(model, config.recipe), build_mixup(config.recipe, CLASSES)
    loss = build_loss(config.recipe, mixup)
    images, targets = torch.randn(micro, 3, size, size, device=device), torch.arange(micro, device=device)

    def backward() -> None:
        x, y = mixup(images.clone(), targets) if mixup else (images, targets)
        with cast(config, device):
            logits = model(x)
        loss(logits.float(), y).backward()

    calls = {"micro-batch": backward, "optimizer": optimizer.step}
    part, step = medians(in_turns(calls, repeats, warm_up=2))
    batch = config.recipe.batch_size
    speed = batch / (batch / micro * part + step)
    return {
        "row": row,
        "device": device_name(device),
        "images_per_second": rounded(speed),
        "memory_gb": round(peak(device.type) / 1e9, 3),
        "micro_batch": micro,
        "precision": config.runtime.precision,
        "repeats": repeats,
        **provenance(),
    }


def measure_detector(row: Published, overrides: list[str], repeats: int) -> dict[str, Any]:
    device = connect(compose([word for word in overrides if word.startswith("runtime.device=")]).runtime).device
    try:
        from scripts.bench import detector_step
    except ImportError as error:
        raise ConfigError(f"rows={row.id}: a detector needs MMDetection, make setup-detection ({error})") from None
    measured = detector_step.measure(row.name, device.type, repeats)
    return {"row": row.id, "device": device_name(device), **measured, **provenance()}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return machine_name("cuda")
    return f"cpu, {machine_name('cpu')}, {torch.get_num_threads()} threads"


def main(words: list[str]) -> None:
    with one_line_errors():
        options, overrides = parse(Options, words, __doc__)
        out = Path(options.out)
        for row in rows_of(options.rows):
            line = measure(row, overrides, options.repeats)
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            speed = f"{line['images_per_second']:,} images/s, {line['memory_gb']:.1f} GB"
            print(f"{row}: {speed} ({line['device']}, {line['precision']})", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
