"""How fast images are read, decoded and augmented, by our loader and others: python -m scripts.bench.data FOLDER

One process (no workers) reads every file of a split once with each loader, in turns and in random order, with the same
transform on the same files. A rate is images per second of processor time, so per core; next to it is that of the
wall clock, which other programs disturb. `seen` counts distinct files for ours and images for the others; timm's loader
leaves out the last incomplete batch in training.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from scripts.arguments import argument_parser
from scripts.bench.timing import in_turns, medians
from scripts.options import one_line_errors
from train.config import AugmentConfig, DataConfig, RecipeConfig
from train.data.formats import open_split
from train.data.loader import Batch, Loader, Samples
from train.data.order import Key, epoch_order
from train.data.transforms import Transform, train_transform

Epoch = Callable[[int], Iterable[Any]]  # epoch -> batches of images, targets, ...


def ours(root: str, format_: str, split: str, transform: Transform, batch: int) -> Epoch:
    images = open_split(DataConfig(format=format_, root=root), split)
    samples = Samples(images, transform, seed=0)

    def epoch(number: int) -> Loader:
        order = epoch_order(len(images), 0, number, order=images.order).tolist()
        keys = [[Key(number, i) for i in order[k : k + batch]] for k in range(0, len(order), batch)]
        return Loader(DataLoader(samples, batch_sampler=keys, num_workers=0))

    return epoch


def torchvisions(root: str, split: str, transform: Transform, batch: int) -> Epoch:
    loader = DataLoader(ImageFolder(str(Path(root) / split), transform), batch_size=batch, shuffle=True)
    return lambda number: loader


def timms(root: str, split: str, transform: Transform, batch: int, size: int) -> Epoch:
    dataset = create_dataset("", root=root, split=split)
    kwargs: dict[str, Any] = {"num_workers": 0, "persistent_workers": False, "use_prefetcher": False}
    loader = create_loader(dataset, (3, size, size), batch, is_training=True, **kwargs)
    dataset.transform = transform
    return lambda number: loader


class Reading:
    """Reads an epoch at each call; remembers the seconds by the wall clock, and how many images there were."""

    def __init__(self, epoch: Epoch):
        self.epoch, self.numbers = epoch, count()
        self.clock: list[float] = []
        self.seen: list[int] = []

    def __call__(self) -> None:
        began = time.perf_counter()
        images = 0
        seen: set[int] = set()
        for batch in self.epoch(next(self.numbers)):
            images += len(batch[0])
            if isinstance(batch, Batch):
                seen.update(torch.as_tensor(batch.indices).tolist())
        self.clock.append(time.perf_counter() - began)
        self.seen.append(len(seen) or images)


def main() -> None:
    parser = argument_parser("bench.data", __doc__)
    parser.add_argument("root", help="a folder with SPLIT/<class>/*")
    parser.add_argument("--tar", help="the same in a tar archive, to read by our loader too")
    parser.add_argument("--shards", help="the same as shards, likewise")
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side of the crops (default: 224)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--auto-augment", help="timm's notation; default: crop and flip alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with one_line_errors():
        readings = {name: Reading(epoch) for name, epoch in loaders(options)}
        files = len(open_split(DataConfig(format="folder", root=options.root), options.split))
    samples = in_turns(readings, options.rounds, warm_up=0, clock=time.process_time)
    medians(samples)  # exits where a loader failed
    print(f"{files} files, {options.rounds} rounds in turns; median (least to greatest); {os.cpu_count()} cores")
    print(f"{'':<14}{'images/s per core':<26}{'by the wall clock':<26}{'to torchvision':<24}seen")
    rates = {
        name: [seen / cpu for seen, cpu in zip(reading.seen, samples[name].values, strict=True)]
        for name, reading in readings.items()
    }
    for name, reading in readings.items():
        by_clock = [seen / spent for seen, spent in zip(reading.seen, reading.clock, strict=True)]
        ratios = [mine / its for mine, its in zip(rates[name], rates["torchvision"], strict=True)]
        seen = ", ".join(map(str, sorted(set(reading.seen))))
        print(f"{name:<14}{spread(rates[name]):<26}{spread(by_clock):<26}{spread(ratios, 3):<24}{seen}")
    for name, reading in readings.items():
        expected = files - files % options.batch if name == "timm" else files
        if set(reading.seen) != {expected}:
            sys.exit(f"{name} lost images: it should read {expected}.")


def loaders(options: argparse.Namespace) -> Iterator[tuple[str, Epoch]]:
    recipe = RecipeConfig(augment=AugmentConfig(auto_augment=options.auto_augment))
    transform = train_transform(DataConfig(image_size=options.size), recipe)
    split, batch = options.split, options.batch
    for format_, root in (("folder", options.root), ("tar", options.tar), ("shards", options.shards)):
        if root:
            yield f"ours, {format_}", ours(root, format_, split, transform, batch)
    yield "timm", timms(options.root, split, transform, batch, options.size)
    yield "torchvision", torchvisions(options.root, split, transform, batch)


def spread(values: list[float], digits: int = 0) -> str:
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
