"""Training in which all that is random follows from the seed and the number of the step. So a checkpoint of any
iteration is enough to resume exactly: the order of the images, their augmentation, and what the model draws at random
are as they would have been.

MMEngine's own loop resumes at the beginning of an epoch only, and its random numbers go on from where the process is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from mmdet.registry import DATA_SAMPLERS, DATASETS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, set_random_seed
from torch.utils.data import BatchSampler, Sampler

from detection.plugin.errors import BrokenImage, SettingError, UnreadableImage


class Numbered(NamedTuple):
    """An image of a data set, for a step of the run."""

    step: int
    index: int  # type: ignore[assignment]  # not a tuple's method


def set_seed(*numbers: int) -> None:
    """Seed random, NumPy and torch by whole numbers."""
    set_random_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


class SeededDataset:
    """Samples of a data set by `Numbered`, the same for any number of worker processes.

    With `substitute`, a broken image is replaced by the next in the data set that can be read. The sample's metadata
    then have the path of the broken one as "substitutes_for".
    """

    MOST_BROKEN = 100  # in a row

    def __init__(self, dataset: Any, seed: int, substitute: bool = False):
        self.dataset = DATASETS.build(dataset)
        self.seed, self.substitute = seed, substitute

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not made yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @property
    def pipeline(self) -> Any:
        return self.dataset.pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        """MMDetection's PipelineSwitchHook sets it."""
        self.dataset.pipeline = pipeline

    def __getitem__(self, key: Numbered) -> Any:
        """Raises UnreadableImage or, without `substitute`, BrokenImage."""
        tries = min(self.MOST_BROKEN, len(self)) if self.substitute else 1
        broken: list[BrokenImage] = []
        for used in range(key.index, key.index + tries):
            set_seed(self.seed, *key)
            try:
                sample = self.dataset[used % len(self)]
            except BrokenImage as error:
                broken.append(error)
                continue
            if broken:
                sample["data_samples"].set_metainfo({"substitutes_for": broken[0].path, "index": key.index})
            return sample
        if self.substitute:
            raise UnreadableImage(f"{tries} images in a row are broken, the first of them: {broken[0]}")
        raise broken[0]


class NumberedBatches(BatchSampler):
    """The batches of another batch sampler, as lists of `Numbered`, from any step on.

    Args:
        batches: the configuration of the other one; None: batches in the sampler's order.
    """

    def __init__(
        self, sampler: Sampler[int], batch_size: int, batches: dict[str, Any] | None = None, drop_last: bool = False
    ):
        super().__init__(sampler, batch_size, drop_last)
        self.batches: Any = BatchSampler(sampler, batch_size, drop_last)
        if batches is not None:
            self.batches = DATA_SAMPLERS.build(batches, default_args={"sampler": sampler, "batch_size": batch_size})
        self.first = self.done = 0

    def start(self, first: int, done: int) -> None:
        """The next epoch begins with step `first` of the run, and `done` of its batches are left out."""
        self.first, self.done = first, done

    def __iter__(self) -> Iterator[list[Any]]:
        for place, batch in enumerate(self.batches):
            if place >= self.done:
                yield [Numbered(self.first + place, index) for index in batch]

    def __len__(self) -> int:
        return len(self.batches)


@LOOPS.register_module()
class ExactTrainLoop(EpochBasedTrainLoop):
    """`train_cfg = dict(type="ExactTrainLoop", max_epochs=12, val_interval=1)`: an EpochBasedTrainLoop that resumes
    exactly from a checkpoint of any iteration, such as those of `CheckpointHook(by_epoch=False, interval=1000)`.

    On a CPU that is to the bit. The number of processes must stay the same, that of workers may change.

    Args:
        substitute: whether to replace broken images (`SeededDataset`).

    Raises:
        SettingError: the data loader is not a configuration.
    """

    def __init__(self, runner: Any, dataloader: Any, *args: Any, substitute: bool = False, **settings: Any):
        if not isinstance(dataloader, dict):
            raise SettingError("ExactTrainLoop: train_dataloader must be a configuration, not a DataLoader.")
        super().__init__(runner, seeded(dataloader, runner.seed, substitute), *args, **settings)

    def run_epoch(self) -> None:
        """One epoch, or the rest of one: after a checkpoint of its last iteration, only the hooks of its end."""
        length = len(self.dataloader)
        first = self._epoch * length
        done = self._iter - first
        self.dataloader.batch_sampler.start(first, done)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        if done < length:
            for index, batch in enumerate(self.dataloader, start=done):
                self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        set_seed(self.runner.seed, self._iter, self.runner.rank)
        super().run_iter(idx, data_batch)


def seeded(dataloader: Any, seed: int, substitute: bool = False) -> Any:
    """An ordinary data loader's configuration, changed to one of numbered batches and seeded samples."""
    made = dict(dataloader)
    made["dataset"] = {"type": SeededDataset, "dataset": made["dataset"], "seed": seed, "substitute": substitute}
    batches = made.pop("batch_sampler", None)
    made["batch_sampler"] = {"type": NumberedBatches, "batches": batches, "drop_last": made.pop("drop_last", False)}
    return made
