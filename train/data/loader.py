"""Samples and batches: images are loaded, augmented and collated, in worker processes or here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.data.ahead import Ahead
from train.data.batching import MicroBatches
from train.data.images import BrokenImage, Images
from train.data.order import Key, seed_everything
from train.data.transforms import Transform
from train.jobs.errors import DataError, without_trace
from train.jobs.signals import outlast_signals

if TYPE_CHECKING:
    from train.data.substitutes import Substitutes


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W)
    targets: Tensor  # (B,)
    indices: Tensor  # (B,), of the samples in their data set


class Loaded(NamedTuple):
    """A transformed image with the key that asked for it. A DataLoader collates many to one, of tensors `(B, ...)`."""

    image: Tensor  # (3, H, W)
    target: int
    index: int  # type: ignore[assignment]  # not a tuple's method
    epoch: int
    copy: int
    used: int  # the index of the image that was read: another than `index` where that one is broken


class Samples(Dataset[Loaded]):
    """Transformed images by key, the same for any number of workers and devices.

    With `substitute`, a broken image is replaced by the next in the data set that can be read.
    """

    MOST_BROKEN = 100  # in a row

    def __init__(self, images: Images, transform: Transform, seed: int, substitute: bool = False):
        self.images, self.transform, self.seed, self.substitute = images, transform, seed, substitute

    def __getitem__(self, key: Key) -> Loaded:
        image, target, used = self._load(key.index)
        seed_everything(self.seed, *key)
        return Loaded(self.transform(image), target, key.index, key.epoch, key.copy, used)

    def _load(self, index: int) -> tuple[Image.Image, int, int]:
        """Image, target, and the index that they are of."""
        length = len(self.images)
        tries = min(self.MOST_BROKEN, length) if self.substitute else 1
        broken = []
        for used in (number % length for number in range(index, index + tries)):
            try:
                return *self.images.load(used), used
            except BrokenImage as error:
                broken.append(error)
        if self.substitute:
            raise DataError(f"{tries} images in a row are broken, the first of them: {broken[0]}")
        raise broken[0]


class Loader:
    """The batches of a DataLoader. Replaced images are recorded when their batch is used, not when it is prefetched.

    Args:
        ahead: with data at URLs, what downloads it for batches to come.
    """

    def __init__(self, loaded: DataLoader[Loaded], substitutes: Substitutes | None = None, ahead: Ahead | None = None):
        self.loaded, self.substitutes, self.ahead = loaded, substitutes, ahead

    def __len__(self) -> int:
        return len(self.loaded)

    def __iter__(self) -> Iterator[Batch]:
        try:
            batches = iter(self.loaded)  # starts the workers, which should not be forked of several threads
            if self.ahead:
                self.ahead.start()
                self.ahead.advance(0)
            for used, batch in enumerate(batches, start=1):
                if self.ahead:
                    self.ahead.advance(used)
                if self.substitutes:
                    self.substitutes.record(batch)
                yield Batch(batch.image, batch.target, batch.index)
            return
        except DataError as error:
            message = without_trace(str(error))
            error.__traceback__ = None  # it holds the workers' handles in a cycle, whose collection waits 5 s for each
        finally:
            if self.ahead:
                self.ahead.close()
        raise DataError(message)


def train_loader(
    samples: Samples, batches: MicroBatches, workers: int, pin: bool, substitutes: Substitutes | None = None
) -> Loader:
    ahead = Ahead(samples.images, batches, batches.micro * batches.world) if samples.images.ahead else None
    return Loader(_load(samples, batches, workers, pin), substitutes, ahead)


def eval_loader(samples: Samples, batch_size: int, workers: int, pin: bool, rank: int = 0, world: int = 1) -> Loader:
    """Every sample once, without padding: `rank` takes the samples from `rank / world` of the data set on."""
    begin, end = (number * len(samples.images) // world for number in (rank, rank + 1))
    keys = [Key(0, index) for index in range(begin, end)]
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    ahead = Ahead(samples.images, batches, batch_size * samples.images.parts) if samples.images.ahead else None
    return Loader(_load(samples, batches, workers, pin), ahead=ahead)


def _load(samples: Samples, batches: Iterable[list[Key]], workers: int, pin: bool) -> DataLoader[Loaded]:
    return DataLoader(
        samples, batch_sampler=batches, num_workers=workers, pin_memory=pin, worker_init_fn=outlast_signals
    )
