"""What the trainer itself costs: its step against that of a bare loop, on the same model and images in memory.

    python -m scripts.bench.trainer                   ResNet18, static, 64 pixels, batch 32
    python -m scripts.bench.trainer n=1 data.image_size=96 recipe.batch_size=16 steps=10

steps      timed steps of each kind, after 5 to warm up; all other keys are those of `python -m train`

The figure is the ratio of the medians.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.bench.timing import in_turns, medians
from scripts.options import one_line_errors, parse
from train.config import TrainConfig, compose
from train.data.loader import Batch
from train.jobs.world import World, connect
from train.trainer import Trainer

DEFAULTS = ("backbone=resnet18", "n=static", "data.image_size=64", "recipe.batch_size=32")


@dataclass
class Options:
    steps: int = 40


def main(words: list[str]) -> None:
    with one_line_errors():
        options, overrides = parse(Options, words, __doc__)
        config = compose([*DEFAULTS, *overrides])
        size, count = config.data.image_size, config.recipe.batch_size
        indices = torch.arange(count)
        batch = Batch(torch.randn(count, 3, size, size), indices % 10, indices)
        world = connect(config.runtime)
        bare, trainer = measure(config, world, batch, options.steps)
    print(f"{config.backbone.label} n={config.n}, {size} pixels, batch {count}, {world.device}")
    print(f"bare {1000 * bare:.1f} ms, trainer {1000 * trainer:.1f} ms a step: {100 * (trainer / bare - 1):+.1f}%")


def measure(config: TrainConfig, world: World, batch: Batch, steps: int) -> list[float]:
    """Median seconds of a bare step, and of the trainer's."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), world)
        trainer.model.train()
        learner = trainer.learner

        def bare() -> None:
            """Forward, backward, update: what every loop has to do."""
            images, targets = batch.images.to(world.device), batch.targets.to(world.device)
            learner.loss(trainer.model(images), targets).backward()
            learner.optimizer.step()
            learner.optimizer.zero_grad()

        return medians(in_turns({"bare": bare, "trainer": lambda: trainer.train_step(iter([batch]))}, steps, warm_up=5))


if __name__ == "__main__":
    main(sys.argv[1:])
