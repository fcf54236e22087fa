"""The data of one run: both splits, checked against each other, and their batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.config import DataConfig, TrainConfig
from train.data.batching import MicroBatches, accumulation
from train.data.formats import open_split
from train.data.images import Images, Part, identity
from train.data.loader import Batch, Loader, Samples, eval_loader, train_loader
from train.data.substitutes import Substitutes
from train.data.transforms import eval_transform, train_transform
from train.jobs.agreement import agree, once_per_node
from train.jobs.errors import ConfigError
from train.jobs.world import World


def open_splits(data: DataConfig) -> tuple[Images, Images]:
    """The images to train and to evaluate on."""
    return open_split(data, data.train_split), open_split(data, data.eval_split)


def check_same_classes(data: DataConfig, train: Sequence[str], evaluation: Sequence[str]) -> None:
    """Raises ConfigError: the splits differ in their classes; it says in which."""
    apart = [(data.train_split, set(train) - set(evaluation)), (data.eval_split, set(evaluation) - set(train))]
    said = [f"only {split!r} has {_some(sorted(names))}" for split, names in apart if names]
    if not said and list(train) != list(evaluation):
        said = ["they have them in another order"]
    if said:
        raise ConfigError(f"data.root={data.root!r}: the splits do not have the same classes: {'; '.join(said)}.")


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest


class RunData:
    """The samples to train and to evaluate on, and how an epoch is cut into steps and micro-batches.

    Attributes:
        train_samples, eval_samples: `Samples` of the splits.
        substitutes: the list of replaced images, or None (data.on_error=stop).
        accumulation: micro-batches of one step on one device.
        identity: what a resumed run recognizes its data by.

    Raises:
        ConfigError: a split is missing, the splits differ in their classes, or the batch does not fit the data.
    """

    def __init__(self, config: TrainConfig, folder: Path, world: World):
        self.config, self.world = config, world
        data, recipe = config.data, config.recipe
        train_images, eval_images = once_per_node(world, lambda: open_splits(data))
        if data.train_images is not None:
            train_images = Part(train_images, data.train_images, "data.train_images")
        check_same_classes(data, train_images.classes, eval_images.classes)
        self.classes = train_images.classes
        substitute = data.on_error == "substitute"
        self.train_samples = Samples(train_images, train_transform(data, recipe), config.seed, substitute)
        self.eval_samples = Samples(eval_images, eval_transform(data, recipe), config.seed)
        self.substitutes = Substitutes(folder, train_images, world.rank) if substitute else None
        self.identity = {"training": identity(train_images), "evaluation": identity(eval_images)}
        agree(world, "the data", self.identity, "data.root must have the same images on all nodes.")
        self.accumulation = accumulation(recipe.batch_size, config.runtime.micro_batch, world.size)
        micro = recipe.batch_size // (self.accumulation * world.size)
        if micro % 2 and (recipe.mixup or recipe.cutmix):
            raise ConfigError(
                f"recipe.mixup and cutmix pair the samples of a micro-batch, which has {micro}: an odd number."
            )
        if recipe.batch_size % train_images.parts:
            raise ConfigError(
                f"data.parts={train_images.parts} does not divide recipe.batch_size={recipe.batch_size}: a batch takes "
                f"equally many samples of each part."
            )
        self.steps_per_epoch = len(train_images) // recipe.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"recipe.batch_size={recipe.batch_size} is more than the {len(train_images)} training images: lower it."
            )

    def train_batches(self, start: int) -> Iterator[Batch]:
        """This rank's micro-batches from optimizer step `start` to the end of training. Workers start at once."""
        config, runtime = self.config, self.config.runtime
        images = self.train_samples.images
        batches = MicroBatches(
            len(images),
            batch_size=config.recipe.batch_size,
            accumulation=self.accumulation,
            steps=config.recipe.epochs * self.steps_per_epoch,
            seed=config.seed,
            start=start,
            repeats=config.recipe.augment.repeats,
            rank=self.world.rank,
            world=self.world.size,
            order=images.order,
            parts=images.parts,
        )
        return iter(train_loader(self.train_samples, batches, runtime.workers, self._pin, self.substitutes))

    def eval_batches(self) -> Loader:
        """This rank's share of the evaluation images, in order."""
        workers = self.config.runtime.workers
        return eval_loader(self.eval_samples, self._eval_batch, workers, self._pin, self.world.rank, self.world.size)

    @property
    def most_eval_batches(self) -> int:
        """The number of rank 0, which no other rank exceeds."""
        return math.ceil(math.ceil(len(self.eval_samples.images) / self.world.size) / self._eval_batch)

    @property
    def _eval_batch(self) -> int:
        return self.config.runtime.micro_batch or min(256, self.config.recipe.batch_size)

    @property
    def _pin(self) -> bool:
        return self.world.device.type == "cuda"
