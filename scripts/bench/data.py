"""How fast images are read, decoded and augmented, by our loader and others: python -m scripts.bench.data FOLDER

One process (no workers) reads every file of a split once with each loader, by turns and in random order, with the
same transform object on the same files. A rate is images by seconds of processor time, so images/s per core; that by
the clock, which other programs disturb, stands beside it. `seen` counts distinct files for ours, and images for the
others; timm's leaves out the last incomplete batch in training.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from train.config import AugmentConfig, DataConfig, RecipeConfig
from train.data.formats import open_split
from train.data.loader import Batch, Loader, Samples
from train.data.order import Key, epoch_order
from train.data.transforms import Transform, train_transform
from train.jobs.errors import ConfigError, DataError

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


def measure(batches: Iterable[Any]) -> tuple[float, float, int]:
    """Images by second of processor time, by second of the clock, and how many there were."""
    cpu, clock = time.process_time(), time.perf_counter()
    images = 0
    seen: set[int] = set()
    for batch in batches:
        images += len(batch[0])
        if isinstance(batch, Batch):
            seen.update(torch.as_tensor(batch.indices).tolist())
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    return images / cpu, images / clock, len(seen) or images


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.data", description=__doc__)
    parser.add_argument("root", help="a folder with SPLIT/<class>/*")
    parser.add_argument("--tar", help="the same in a tar archive, to read by our loader too")
    parser.add_argument("--shards", help="the same as shards, likewise")
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side of the crops (default: 224)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--auto-augment", help="timm's notation; default: crop and flip alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = RecipeConfig(augment=AugmentConfig(auto_augment=given.auto_augment))
    transform = train_transform(DataConfig(image_size=given.size), recipe)
    try:
        loaders = {"ours, folder": ours(given.root, "folder", given.split, transform, given.batch)}
        for name in ("tar", "shards"):
            if root := getattr(given, name):
                loaders[f"ours, {name}"] = ours(root, name, given.split, transform, given.batch)
        files = len(open_split(DataConfig(format="folder", root=given.root), given.split))
    except (ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    loaders["timm"] = timms(given.root, given.split, transform, given.batch, given.size)
    loaders["torchvision"] = torchvisions(given.root, given.split, transform, given.batch)
    results: dict[str, list[tuple[float, float, int]]] = {name: [] for name in loaders}
    for turn in range(given.rounds):
        names = list(loaders) if turn % 2 else list(loaders)[::-1]
        for name in names:
            results[name].append(measure(loaders[name](turn)))
    print_table(results, files, given.rounds)
    for name, found in results.items():
        whole = files - files % given.batch if name == "timm" else files
        if {seen for _, _, seen in found} != {whole}:
            sys.exit(f"{name} lost images: it should read {whole}.")


def print_table(results: dict[str, list[tuple[float, float, int]]], files: int, rounds: int) -> None:
    print(f"{files} files, {rounds} rounds by turns; median (least to greatest); {os.cpu_count()} cores")
    print(f"{'':<14}{'images/s per core':<26}{'by the clock':<26}{'to torchvision':<24}seen")
    for name, found in results.items():
        ratios = [mine[0] / its[0] for mine, its in zip(found, results["torchvision"], strict=True)]
        columns = [spread([f[0] for f in found]), spread([f[1] for f in found]), spread(ratios, 3)]
        seen = {f[2] for f in found}
        print(f"{name:<14}{columns[0]:<26}{columns[1]:<26}{columns[2]:<24}{', '.join(map(str, sorted(seen)))}")


def spread(values: list[float], digits: int = 0) -> str:
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
