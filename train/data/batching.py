"""How a global batch is cut into micro-batches, one after the other on each device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from train.data.order import Key, Order, deal, epoch_order
from train.jobs.errors import ConfigError


class MicroBatches:
    """The keys of one rank's micro-batches, from optimizer step `start` to the end of training.

    A global batch is cut into `world * accumulation` micro-batches; `rank` takes every `world`-th. Of an order of
    several parts (`deal`), a rank has parts of its own where their number is a multiple of `world * accumulation`.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        accumulation: int,
        steps: int,
        seed: int,
        start: int = 0,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
        order: Order | None = None,
        parts: int = 1,
    ):
        self.order, self.parts = order, parts
        self.length, self.batch_size, self.accumulation, self.steps = length, batch_size, accumulation, steps
        self.seed, self.start, self.repeats, self.rank, self.world = seed, start, repeats, rank, world
        self.micro = batch_size // (accumulation * world)

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = self.length // self.batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = epoch_order(self.length, self.seed, epoch, self.repeats, self.order)
                order = deal(order, self.parts, self.batch_size)
            first = step % per_epoch * self.batch_size
            for turn in range(self.accumulation):
                begin = first + (turn * self.world + self.rank) * self.micro
                indices = order[begin : begin + self.micro].tolist()
                yield [Key(epoch, index, place % self.repeats) for place, index in enumerate(indices, start=begin)]


def accumulation(batch_size: int, micro_batch: int | None, world: int) -> int:
    """The number of micro-batches into which a device cuts its share of the global batch: the fewest of equal size.

    Raises:
        ConfigError: the batch cannot be divided evenly, or only into micro-batches of under half the size asked for.
    """
    if batch_size % world:
        raise ConfigError(f"recipe.batch_size={batch_size} cannot be divided evenly among {world} devices.")
    share = batch_size // world
    asked = min(micro_batch or share, share)
    if not _cuts_well(share, asked):
        larger = next(size for size in range(asked, share + 1) if share % size == 0)
        fewer = next(size for size in range(share, 0, -1) if _cuts_well(size, asked))
        more = next(size for size in itertools.count(share) if _cuts_well(size, asked))
        raise ConfigError(
            f"runtime.micro_batch={micro_batch}: a device's {share} samples of recipe.batch_size={batch_size} are cut "
            f"into equal parts of at most {share // _cuts(share, asked)}. The nearest that work are "
            f"runtime.micro_batch={larger}, or recipe.batch_size={fewer * world} or {more * world}."
        )
    return _cuts(share, asked)


def _cuts(share: int, most: int) -> int:
    """The fewest equal parts of a share, of at most `most`."""
    return next(count for count in range(-(-share // most), share + 1) if share % count == 0)


def _cuts_well(share: int, most: int) -> bool:
    return 2 * (share // _cuts(share, most)) >= min(share, most)
