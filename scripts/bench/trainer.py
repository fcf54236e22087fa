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
from train.data.loader import Sample
from train.jobs.world import connect
from train.trainer import Trainer

DEFAULTS = ("backbone=resnet18", "n=static", "data.image_size=64", "recipe.batch_size=32")
CONFIGS = Path(__file__).parents[2] / "configs"


def bare_step(trainer: Trainer, sample: Sample) -> None:
    """Forward, backward, update: what every loop has to do."""
    images, targets = sample.image.to(trainer.world.device), sample.target.to(trainer.world.device)
    trainer.loss(trainer.model(images), targets).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def timed(trainer: Trainer, step: Callable[[Sample], object], sample: Sample) -> float:
    began = time.perf_counter()
    step(sample)
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
        batch = config.recipe.batch_size
        indices = torch.arange(batch)
        sample = Sample(torch.randn(batch, 3, size, size), indices % 10, indices)
        trainer.model.train()
        bare, whole = [], []
        for step in range(options.steps + 5):
            order = [(bare, lambda s: bare_step(trainer, s)), (whole, lambda s: trainer._train_step(iter([s])))]
            for times, run in order if step % 2 else reversed(order):
                times.append(timed(trainer, run, sample))
    a, b = median(bare[5:]), median(whole[5:])
    print(
        f"{config.backbone.label} n={config.n}, {size} pixels, batch {config.recipe.batch_size}, {trainer.world.device}"
    )
    print(f"bare {1000 * a:.1f} ms, trainer {1000 * b:.1f} ms a step: {100 * (b / a - 1):+.1f}%")


if __name__ == "__main__":
    main()
