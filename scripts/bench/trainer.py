"""What the trainer itself costs: its step beside a bare loop's, on the same model and the same images in memory.

    python -m scripts.bench.trainer                   ResNet18, static, 64 pixels, batch 32
    python -m scripts.bench.trainer n=1 data.image_size=96 recipe.batch_size=16

The two take turns, so that what else the machine does falls on both; the figure is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir

from train.config import validate
from train.data.loader import Batch
from train.jobs.world import connect
from train.trainer import Trainer

DEFAULTS = ("backbone=resnet18", "n=static", "data.image_size=64", "recipe.batch_size=32")
CONFIGS = Path(__file__).parents[2] / "configs"


def bare_step(trainer: Trainer, batch: Batch) -> None:
    """Forward, backward, update: what every loop has to do."""
    images, targets = batch.images.to(trainer.world.device), batch.targets.to(trainer.world.device)
    trainer.learner.loss(trainer.model(images), targets).backward()
    trainer.learner.optimizer.step()
    trainer.learner.optimizer.zero_grad()


def timed(trainer: Trainer, step: Callable[[Batch], object], batch: Batch) -> float:
    began = time.perf_counter()
    step(batch)
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="as of python -m train")
    parser.add_argument("--steps", type=int, default=40, help="of each kind, after 5 to warm up")
    options = parser.parse_args()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = validate(compose("train", [*DEFAULTS, *options.settings]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), connect(config.runtime))
        size = config.data.image_size
        count = config.recipe.batch_size
        indices = torch.arange(count)
        batch = Batch(torch.randn(count, 3, size, size), indices % 10, indices)
        trainer.model.train()
        bare, whole = [], []
        for step in range(options.steps + 5):
            order = [(bare, lambda b: bare_step(trainer, b)), (whole, lambda b: trainer.train_step(iter([b])))]
            for times, run in order if step % 2 else reversed(order):
                times.append(timed(trainer, run, batch))
    a, b = median(bare[5:]), median(whole[5:])
    print(
        f"{config.backbone.label} n={config.n}, {size} pixels, batch {config.recipe.batch_size}, {trainer.world.device}"
    )
    print(f"bare {1000 * a:.1f} ms, trainer {1000 * b:.1f} ms a step: {100 * (b / a - 1):+.1f}%")


if __name__ == "__main__":
    main()
