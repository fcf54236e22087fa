"""How fast this machine trains the paper's ImageNet rows: what the report tells the hours of rows not run yet from.

    python -m scripts.bench.step_time --all                                       every row, on the GPU if there is one
    python -m scripts.bench.step_time resnet18_kw1d4x resnet50 --set runtime.precision=bfloat16 runtime.micro_batch=128

Model, optimizer, loss and mixup are the row's own; images are random numbers in memory, so loading them is not counted.
A batch is worked off in micro-batches, of which a few are timed, and the optimizer's step once for all of them. Each
row adds a line to the file (runs/steps.jsonl), which the report reads; a later one of a row takes an earlier's place.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from scripts.bench.timing import repeated
from scripts.report.__main__ import STEPS
from scripts.report.published import CLASSIFICATION, published
from train.config import TrainConfig, validate
from train.evaluate import cast
from train.jobs.provenance import provenance
from train.jobs.world import connect
from train.model import build_model
from train.optim import build_loss, build_mixup, build_optimizer

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = 1000
MICRO_BATCH = {"cpu": 8, "cuda": 64}
WARM_UP = 2


def composed(row: str, settings: list[str]) -> TrainConfig:
    (overrides,) = [known.overrides for known in published() if known.id == row]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return validate(compose("train", [*overrides, "data.root=unused", *settings]))


def measure(row: str, settings: list[str], repeats: int) -> dict[str, Any]:
    """Images per second of training, as a line of the report's file."""
    config = composed(row, settings)
    device = connect(config.runtime).device
    micro = config.runtime.micro_batch or MICRO_BATCH[device.type]
    size = config.data.image_size
    model = build_model(config, CLASSES).to(device).train()
    optimizer, mixup = build_optimizer(model, config.recipe), build_mixup(config.recipe, CLASSES)
    loss = build_loss(config.recipe, mixup)
    images, targets = torch.randn(micro, 3, size, size, device=device), torch.arange(micro, device=device)

    def backward() -> None:
        x, y = mixup(images.clone(), targets) if mixup else (images, targets)
        with cast(config, device):
            logits = model(x)
        loss(logits.float(), y).backward()

    times = repeated(backward, device.type, repeats, WARM_UP)
    step = median(repeated(optimizer.step, device.type, repeats, WARM_UP))
    batch = config.recipe.batch_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    speed = batch / (batch / micro * median(times) + step)
    return {"row": row, "device": name, "images_per_second": round(speed, 3), "micro_batch": micro,
            "precision": config.runtime.precision, "repeats": repeats, **provenance()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.step_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", help="such as resnet18_kw1d4x")
    parser.add_argument("--all", action="store_true", help="every ImageNet row")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings as of python -m train")
    parser.add_argument("--repeats", type=int, default=3, help="micro-batches that are timed, after two to warm up")
    parser.add_argument("--out", type=Path, default=STEPS, help=f"the file that lines are added to: {STEPS}")
    options = parser.parse_args()
    known = [row.id for row in published() if row.task == CLASSIFICATION]
    unknown = [row for row in options.rows if row not in known]
    if unknown or not (options.rows or options.all):
        sys.exit(f"{'No such row: ' + ', '.join(unknown) if unknown else 'Name rows, or --all'}. {', '.join(known)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for row in known if options.all else options.rows:
        line = measure(row, options.set, options.repeats)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{row}: {line['images_per_second']:,.1f} images/s ({line['device']}, {line['precision']})", flush=True)


if __name__ == "__main__":
    main()
