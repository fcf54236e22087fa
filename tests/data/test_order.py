"""The same order and augmentation however many processes read, and every sample once."""

import collections
import itertools
import os
import random
import signal
import subprocess

import numpy as np
import pytest
import torch
from helpers.image_sets import flat, loaded, samples_of
from helpers.selection import paired
from torch.utils.data import DataLoader

from train.config import DataConfig, RecipeConfig
from train.data.formats import open_split
from train.data.loader import Samples, eval_loader
from train.data.order import Key, epoch_order
from train.data.transforms import eval_transform
from train.jobs.signals import outlast_signals


def test_samples_do_not_depend_on_workers_ranks_or_accumulation(data):
    samples = samples_of(data)
    alone = flat(loaded(samples))
    assert len(alone) == 48 == len({image for rows in alone.values() for _, image in rows})  # each augmented anew
    for workers, world, accumulation in ((1, 1, 1), (2, 1, 1), (0, 2, 1), (0, 4, 2), (2, 2, 2)):
        assert flat(loaded(samples, workers, world, accumulation=accumulation)) == alone, (workers, world)
    resumed = flat(loaded(samples, start=3))
    assert resumed == {key: rows for key, rows in alone.items() if key[0] >= 3}


def test_a_sample_is_a_function_of_its_key(data):
    samples = samples_of(data)
    keys = [Key(epoch, index, copy) for epoch in (0, 1) for index in range(6) for copy in (0, 1)]
    first = {key: samples[key].image for key in keys}
    random.Random(1).shuffle(keys)
    for key in keys:
        torch.rand(3), random.random(), np.random.rand()
        assert torch.equal(samples_of(data)[key].image, first[key]), key
    assert len({image.numpy().tobytes() for image in first.values()}) == len(keys)
    assert not torch.equal(samples_of(data, seed=4)[keys[0]].image, first[keys[0]])


def test_repeats_are_augmented_apart(data):
    rows = flat(loaded(samples_of(data), steps=2, repeats=2))
    assert len(rows) == 8 and all(len({image for _, image in copies}) == 2 for copies in rows.values())


def test_folder_and_archive_train_on_the_same_batches(folder, archive):
    found = [
        flat(loaded(samples_of(DataConfig(format=format_, root=str(root), image_size=16))))
        for format_, root in (("folder", folder), ("tar", archive))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("window", [1, 2, 3, 50])
def test_shards_are_read_a_few_at_a_time(shards, window):
    images = open_split(DataConfig(format="shards", root=str(shards), window=window), "train")
    orders = [images.order(seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] == images.order(0, 0).tolist()
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(order) == list(range(17))
        read = [shard for shard, _ in itertools.groupby(index // 4 for index in order)]
        at_once = [{index // 4 for index in order[k : k + 1]} for k in range(17)]
        last = {shard: max(k for k in range(17) if shard in at_once[k]) for shard in set(read)}
        begun = {shard: min(k for k in range(17) if shard in at_once[k]) for shard in set(read)}
        opened = [sum(begun[s] <= k <= last[s] for s in begun) for k in range(17)]
        assert max(opened) <= window


def test_an_epoch_of_shards_is_cut_as_that_of_a_folder(shards):
    order = open_split(DataConfig(format="shards", root=str(shards)), "train").order
    assert epoch_order(17, 5, 2, order=order).tolist() == order(5, 2).tolist()
    assert epoch_order(17, 5, 2, 3, order).tolist() == order(5, 2).repeat_interleave(3)[:17].tolist()


@pytest.mark.parametrize("world, workers", paired([1, 2, 3, 5], [0, 2]))
def test_evaluation_sees_every_sample_once(data, world, workers):
    samples = Samples(open_split(data, "val"), eval_transform(data, RecipeConfig()), 0)
    loaders = [eval_loader(samples, 4, workers, False, rank, world) for rank in range(world)]
    seen = [index for loader in loaders for batch in loader for index in batch.indices.tolist()]
    assert sorted(seen) == list(range(13))
    assert sum(len(loader) for loader in loaders) == sum(-(-len(range(rank, 13, world)) // 4) for rank in range(world))


class ItsProcess(torch.utils.data.Dataset):
    """Each sample is the number of the process that loads it; they do not end."""

    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        return os.getpid()


def test_a_process_that_loads_data_outlasts_signals_of_others():
    """All processes of a job get them, and the one that trains has to save first."""
    loader = DataLoader(ItsProcess(), batch_size=None, num_workers=1, worker_init_fn=outlast_signals)
    batches = iter(loader)
    process = next(batches)
    for name in ("INT", "USR1", "TERM", "TERM"):
        subprocess.run(["kill", f"-{name}", str(process)], check=True)
    assert [next(batches) for _ in range(19)] == [process] * 19


def test_a_process_that_loads_data_ends_at_its_parents_sigterm():
    loader = DataLoader(ItsProcess(), batch_size=None, num_workers=1, worker_init_fn=outlast_signals)
    batches = iter(loader)
    os.kill(next(batches), signal.SIGTERM)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        collections.deque(batches, maxlen=0)
