"""The order of samples and the seeds of their augmentation: functions of the seed, the epoch and the index alone, so
that a resumed run needs no saved random state."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Order = Callable[[int, int], Tensor | None]  # a data set's `order`: (seed, epoch) -> indices `(N,)`, or None for any


class Key(NamedTuple):
    """One sample of one epoch. With the seed, it decides the sample's augmentation."""

    epoch: int
    index: int  # type: ignore[assignment]  # not a tuple's method
    copy: int = 0  # with augment.repeats, which of the image's copies in this epoch


def order_generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))


def epoch_order(length: int, seed: int, epoch: int, repeats: int = 1, order: Order | None = None) -> Tensor:
    """Indices `(length,)` in the order of an epoch, the data set's own or a random one; with repeats, each image that
    many times in a row, and accordingly fewer images (repeated augmentation)."""
    indices = order(seed, epoch) if order else None
    if indices is None:
        indices = torch.randperm(length, generator=order_generator(seed, epoch))
    return indices.repeat_interleave(repeats)[:length]


def deal(order: Tensor, parts: int, batch_size: int) -> Tensor:
    """The order `(N,)` of an epoch in which each batch takes equally many indices from each of its `parts`, which are
    of equal lengths; `(batches * batch_size,)`. So ranks that share a batch read from different parts.

    `batch_size` is a multiple of `parts`."""
    batches = len(order) // batch_size
    share = batch_size // parts
    by_part = order[: len(order) // parts * parts].reshape(parts, -1)[:, : batches * share]
    return by_part.reshape(parts, batches, share).transpose(0, 1).reshape(-1)


def seed_everything(*numbers: int) -> None:
    """Seed random, NumPy and torch by a tuple of whole numbers."""
    # A hash is faster than np.random.SeedSequence, which takes a few percent of the time of reading a small image.
    python, numpy, torch_seed = struct.unpack("<3I", hashlib.blake2b(repr(numbers).encode(), digest_size=12).digest())
    random.seed(python)
    np.random.seed(numpy)
    # torch.manual_seed, without a GPU in use, queues a call for one and records a stack trace, at every sample.
    torch.default_generator.manual_seed(torch_seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(torch_seed)
