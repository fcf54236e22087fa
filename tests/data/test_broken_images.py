"""A broken image stops a run by its name, or has a substitute that is listed."""

import json
from pathlib import Path

import pytest
import torch
from helpers.image_sets import flat, holding, loaded, samples_of
from helpers.images import save_image
from helpers.programs import finish, ranks
from helpers.training import config

from train.config import DataConfig, RecipeConfig
from train.data.batching import MicroBatches
from train.data.formats import open_split
from train.data.images import BrokenImage
from train.data.loader import Samples, eval_loader, train_loader
from train.data.order import Key
from train.data.substitutes import Substitutes
from train.data.transforms import eval_transform
from train.jobs.errors import DataError
from train.jobs.world import World
from train.trainer import Trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_run_by_its_name(broken_data, tmp_path, workers):
    samples = samples_of(broken_data)
    with pytest.raises(BrokenImage, match="cannot be read as an image"):
        [samples.images.load(k) for k in range(17)]
    with pytest.raises(DataError, match="cannot be read as an image") as stopped:
        loaded(samples, workers)
    assert str(tmp_path) in str(stopped.value) and "Traceback" not in str(stopped.value)
    evaluated = Samples(samples.images, eval_transform(DataConfig(image_size=16), RecipeConfig()), 0)
    with pytest.raises(DataError, match="cannot be read as an image"):
        list(eval_loader(evaluated, 4, workers, False))


def test_substitutes_are_the_same_for_all_and_listed_exactly(broken_data, tmp_path):
    data = broken_data
    images = open_split(data, "train")
    bad = []
    for k in range(17):
        try:
            images.load(k)
        except BrokenImage:
            bad.append(k)
    assert len(bad) == 4
    samples = samples_of(data, substitute=True)
    alone = flat(loaded(samples))
    for workers, world in ((2, 1), (0, 2), (1, 4)):
        assert flat(loaded(samples, workers, world)) == alone
    key = Key(1, bad[-1])
    substitute = next(k % 17 for k in range(bad[-1], bad[-1] + 17) if k % 17 not in bad)
    assert samples[key].used == substitute and samples[key].target == images.targets[substitute]

    found = []
    for number, (workers, world) in enumerate(((0, 1), (2, 1), (1, 2))):
        run = tmp_path / f"run{number}"
        for rank in range(world):
            batches = MicroBatches(17, batch_size=8, accumulation=1, steps=6, seed=3, rank=rank, world=world,
                                   order=samples.images.order)  # fmt: skip
            loader = train_loader(samples, batches, workers, False, Substitutes(run, images, rank))
            for k, _ in enumerate(loader):
                if k == 2:  # killed, with others loaded ahead by workers; then again from the start
                    break
            list(loader)
        counts = [Substitutes(run, images, 0).count(epoch) for epoch in range(3)]
        lines = (run / "substituted.txt").read_text().splitlines()
        expected = [(step // 2, index) for step, index in alone if index in bad]
        assert [tuple(map(int, line.split("\t")[:2])) for line in lines] == sorted(expected)
        assert counts == [sum(epoch == e for e, _ in expected) for epoch in range(3)]
        for line in lines:
            _, index, copy, name, other = line.split("\t")
            assert (name, copy) == (images.describe(int(index)), "0")
            assert other in [images.describe(k) for k in range(17) if k not in bad]
        found.append(lines)
    assert found[0] == found[1] == found[2]


def test_nothing_but_broken_images_is_an_error_also_with_substitutes(folder):
    for path in (folder / "train").rglob("*.*"):
        path.is_file() and path.write_bytes(b"no")
    samples = samples_of(DataConfig(format="folder", root=str(folder), image_size=16), substitute=True)
    with pytest.raises(DataError, match="17 images in a row are broken"):
        samples[Key(0, 2)]


def test_a_file_that_is_gone_is_no_broken_image(folder):
    samples = samples_of(DataConfig(format="folder", root=str(folder), image_size=16), substitute=True)
    gone = Path(samples.images.describe(2))
    gone.unlink()
    with pytest.raises(DataError, match="No such file"):
        samples[Key(0, 2)]


def test_names_are_listed_on_a_line_each(tmp_path):
    save_image(tmp_path / "train" / "a" / "new\nline\t\u2028.png", 0)
    save_image(tmp_path / "train" / "a" / "z.png", 1)
    images = open_split(DataConfig(format="folder", root=str(tmp_path)), "train")
    Path(images.describe(0)).write_bytes(b"")
    samples = samples_of(DataConfig(format="folder", root=str(tmp_path), image_size=16), substitute=True)
    batches = MicroBatches(2, batch_size=2, accumulation=1, steps=2, seed=0)
    list(train_loader(samples, batches, 0, False, Substitutes(tmp_path, images)))
    assert Substitutes(tmp_path, images).count(1) == 1
    assert len((tmp_path / "substituted.txt").read_text().splitlines()) == 2


def check_substituted(run):
    """Every epoch's line has the number of what is listed for it."""
    counts = [json.loads(line)["substituted"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    listed = (run / "substituted.txt").read_text().splitlines()
    assert len(counts) == 2 and min(counts) > 0
    assert counts == [sum(line.startswith(f"{epoch}\t") for line in listed) for epoch in (0, 1)]
    return listed


@pytest.mark.slow
def test_a_job_of_two_processes_lists_what_was_substituted_as_one_does(broken, tmp_path):
    words = run_words(holding("shards", broken, tmp_path))
    alone = tmp_path / "alone"
    alone.mkdir()
    Trainer(config(*words), alone, World(0, 1, torch.device("cpu"))).fit()
    for process in ranks(2, "train", *words, "runtime.workers=1", f"hydra.run.dir={tmp_path}/two"):
        finish(process)
    assert check_substituted(tmp_path / "two") == check_substituted(alone)


def test_a_run_lists_what_was_substituted(broken, tmp_path):
    words = run_words(holding("tar", broken, tmp_path))
    (tmp_path / "run").mkdir()
    Trainer(config(*words, "runtime.workers=2"), tmp_path / "run", World(0, 1, torch.device("cpu"))).fit()
    assert all("broken.tar" in line for line in check_substituted(tmp_path / "run"))


def run_words(data):
    """Two epochs of a narrow model on broken images."""
    group = {"tar": "archive"}.get(data.format, data.format)
    return [f"data={group}", f"data.root={data.root}", "data.image_size=16", "data.on_error=substitute",
            "recipe=digits", "recipe.epochs=2", "recipe.batch_size=8", "recipe.warmup_epochs=0",
            "backbone=resnet_digits", "backbone.kwargs.channels=[8,8,8,16]",
            "backbone.kwargs.stem_width=8"]  # fmt: skip
