"""The main job: real configurations composed, then shrunk and run on real digits, through the command line."""

import argparse
import itertools
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from helpers.programs import run
from helpers.selection import paired, representative
from helpers.training import ALONE, NARROW, TINY, config, launch

import kw
from scripts.kill_storm import differences, outcome
from train.config import RecipeConfig
from train.data.batching import MicroBatches, accumulation
from train.data.order import epoch_order
from train.jobs.checkpoints import Checkpoints, newest
from train.jobs.errors import CheckpointError, ConfigError
from train.jobs.reading import FORMAT, read
from train.model import build_model
from train.optim import build_optimizer
from train.schedule import learning_rate, temperature
from train.summary import summarize
from train.trainer import Trainer


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_050", "deit_tiny_patch16_224"])
def test_a_backbone_brings_the_papers_recipe_but_not_to_digits(backbone):
    recipes = {"resnet18": 4e-3, "mobilenetv2_050": 0.05, "deit_tiny_patch16_224": 1e-3}
    on_imagenet = config(f"backbone={backbone}", "data=imagenet", "data.root=x")
    assert on_imagenet.recipe.lr == recipes[backbone]
    assert config(f"backbone={backbone}").recipe == config("recipe=digits").recipe
    assert config(f"backbone={backbone}", "data=imagenet", "data.root=x", "recipe=sgd_100e").recipe.lr == 0.1


@pytest.mark.parametrize(
    "override, words",
    [
        ("n=0", "n=0"),
        ("n=3/2", "n='3/2'"),
        ("recipe.lr=-1", "recipe.lr"),
        ("recipe.schedule=cosin", "recipe.schedule"),
        ("runtime.precision=half", "runtime.precision"),
        ("recipe.augment.hflip=2", "recipe.augment.hflip"),
        ("kw.reduction=3", "kw.reduction"),
        ("resume=maybe", "resume"),
        ("recipe.betas=[2,3]", "recipe.betas"),
        ("recipe.augment.auto_augment=foo", "recipe.augment.auto_augment"),
        ("recipe.optimizer=adamx", "recipe.optimizer"),
        ("backbone.name=resnet19", "backbone.name"),
        ("data.std=[1,1,0]", "data.std"),
        ("data=imagenet", "data.root"),
    ],
)
def test_a_bad_value_is_refused_by_its_key(override, words):
    with pytest.raises(ConfigError, match=words.replace("(", "\\(")):
        config(override)


def test_an_unknown_key_is_refused_by_name():
    with pytest.raises(Exception, match=r"recipe\.lrr"):
        config("recipe.lrr=1")


def test_learning_rate_rises_then_falls_to_its_minimum():
    recipe = RecipeConfig(epochs=10, lr=1.0, min_lr=0.1, warmup_epochs=2)
    rates = [learning_rate(step, 5, recipe) for step in range(50)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == 1.0 and all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[30] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    assert learning_rate(50, 5, recipe) == pytest.approx(0.1)


def test_a_warm_up_from_zero_is_the_releases_rule():
    recipe = RecipeConfig(epochs=10, lr=1.0, warmup_epochs=2, warmup_from_zero=True)
    rates = [learning_rate(step, 5, recipe) for step in range(12)]
    assert rates[:10] == pytest.approx([k / 9 for k in range(10)]) and rates[10] == 1.0 > rates[11]
    assert learning_rate(0, 1, RecipeConfig(epochs=10, warmup_epochs=1, warmup_from_zero=True)) == 0.0  # one step


def test_steps_multiply_the_learning_rate():
    recipe = RecipeConfig(epochs=100, lr=0.1, schedule="step", decay_epochs=[30, 60, 90], decay_rate=0.1)
    at = [learning_rate(epoch * 7, 7, recipe) for epoch in (0, 29, 30, 60, 90)]
    assert at == pytest.approx([0.1, 0.1, 1e-2, 1e-3, 1e-4])


def test_temperature_falls_linearly_once_a_micro_batch():
    assert [temperature(k, 2, 2) for k in range(5)] == [0.75, 0.5, 0.25, 0.0, 0.0]
    assert temperature(0, 10, 0) == 0


def test_weight_decay_spares_biases_and_one_dimensional_parameters():
    made = config("recipe.weight_decay=0.3", "n=1/2")
    model = build_model(made, 10)
    groups = build_optimizer(model, made.recipe).param_groups
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim <= 1 or name.endswith(".bias")
        assert decayed[id(parameter)] == (0 if spared else 0.3), name


@pytest.mark.parametrize("world, turns", [(1, 1), (2, 1), (2, 3)])
def test_devices_share_out_an_epoch_without_loss(world, turns):
    kwargs = {"batch_size": 12, "accumulation": turns, "steps": 4, "seed": 3, "world": world}
    batches = [list(MicroBatches(50, rank=rank, **kwargs)) for rank in range(world)]
    seen = [key.index for rank in batches for batch in rank for key in batch]
    assert sorted(seen) == sorted(epoch_order(50, 3, 0)[:48].tolist())
    resumed = list(MicroBatches(50, rank=0, start=2, **kwargs))
    assert resumed == batches[0][2 * turns :]


def test_accumulation_is_the_fewest_even_cuts():
    assert accumulation(4096, None, 8) == 1
    assert accumulation(4096, 128, 8) == 4
    assert accumulation(12, 5, 1) == 3
    with pytest.raises(ConfigError, match="batch_size"):
        accumulation(10, None, 3)


def test_micro_batches_far_smaller_than_asked_for_are_refused_with_values_that_work():
    words = r"micro_batch=100.*at most 1\..*micro_batch=127, or recipe\.batch_size=252 or 256"
    with pytest.raises(ConfigError, match=words):
        accumulation(254, 100, 2)
    assert [accumulation(batch, micro, 2) for batch, micro in ((254, 127), (252, 100), (256, 100))] == [1, 2, 2]
    assert (accumulation(7, 1, 1), accumulation(7, 99, 1)) == (7, 1)


@pytest.mark.parametrize("epochs, warned", [(0, False), (1, False), (2, True)])
@pytest.mark.parametrize("n", ["static", "1/2"])
def test_a_run_warns_of_a_temperature_that_does_not_reach_0(n, epochs, warned, tmp_path):
    made = config(*TINY, *NARROW, f"n={n}", f"recipe.temperature_epochs={epochs}")
    found = Trainer(made, tmp_path, ALONE).warnings()
    if warned and n != "static":
        assert "temperature_epochs=2 is more than recipe.epochs=1: the temperature ends at 0.50" in found[0]
    else:
        assert found == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    launch("-m", "n=static,1/2", "label=x", "hydra.sweep.subdir=run_${hydra:job.num}", cwd=folder)
    return folder


def test_a_sweep_leaves_a_folder_each_with_what_a_run_leaves(folder):
    for number, n in enumerate(("static", "1/2")):
        run = folder / "runs" / f"run_{number}"
        summary = json.loads((run / "summary.json").read_text())
        wanted = ["top1", "top5", "params", "macs", "images_per_second", "seed", "versions", "commit"]
        assert not [key for key in wanted if key not in summary]
        assert summary["n"] == n and repr(summary["eval_samples"]) == "359"
        assert yaml.safe_load((run / "config.yaml").read_text())["n"] == n
        assert len((run / "metrics.jsonl").read_text().splitlines()) == summary["epochs"] == 1
        assert read(run / "checkpoints" / "last.pt")["step"] == 5


def test_a_checkpoint_evaluates_to_the_accuracy_it_was_saved_at(folder):
    run = folder / "runs" / "run_1"
    (run / "checkpoints" / "last.pt").rename(run / "checkpoints" / "fresh.pt")  # as a kill may leave it
    found = json.loads(launch(f"evaluate={run}", cwd=folder, shrunk=()).stdout)
    (run / "checkpoints" / "fresh.pt").rename(run / "checkpoints" / "last.pt")
    assert found["top1"] == json.loads((run / "summary.json").read_text())["top1"]
    assert (found["n"], found["data"]) == ("1/2", "digits")
    contradicted = launch(f"evaluate={run}", "n=4", cwd=folder, check=False, shrunk=())
    assert contradicted.returncode != 0 and "n=..." in contradicted.stderr


def test_a_released_checkpoint_evaluates(folder):
    model = build_model(config(*NARROW, "n=1/2"), 10)
    torch.save({"model": kw.to_released(model), "args": argparse.Namespace(lr=1)}, folder / "released.pth")
    found = json.loads(launch("evaluate=released.pth", "n=1/2", cwd=folder).stdout)
    assert repr(found["eval_samples"]) == "359"
    other = launch("evaluate=released.pth", "n=1", cwd=folder, check=False)
    assert other.returncode != 0 and "does not fit" in other.stderr


def test_a_bad_value_in_a_sweep_does_not_stop_the_others(tmp_path):
    done = launch("-m", "n=3/2,static", cwd=tmp_path, check=False)
    assert done.returncode != 0 and "3/2" in done.stderr
    assert [path.parent.parent.name.partition("+")[0] for path in tmp_path.rglob("summary.json")] == ["resnet_digits"]
    assert len(list((tmp_path / "runs" / "digits").iterdir())) == 1  # the refused run left no folder


def test_run_folders_need_no_quoting(folder):
    names = [read(path)["config"]["name"] for path in folder.rglob("last.pt")]
    assert names and all(re.fullmatch(r"[\w.+-]+", name) for name in names)


def test_the_report_tells_of_finished_and_unfinished_runs(folder):
    (folder / "runs" / "unfinished").mkdir()
    (folder / "runs" / "unfinished" / "config.yaml").write_text("n: 1\n")
    done = run("scripts.report", "runs", cwd=folder)
    assert "unfinished: not finished" in done.stdout
    assert "| x_kw1d2x+" in (folder / "report" / "table.md").read_text()
    assert len((folder / "report" / "runs.csv").read_text().splitlines()) == 3
    assert (folder / "report" / "index.html").exists()


def averaged(folder):
    """A trainer of two epochs with all that is random, and an average of the weights."""
    random = ("recipe.epochs=2", "recipe.ema_decay=0.9", "recipe.mixup=0.5", "recipe.drop_path=0.1")
    folder.mkdir(exist_ok=True)
    return Trainer(config(*TINY, *NARROW, *random), folder, ALONE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of such a run, which nothing interrupted."""
    trainer = averaged(tmp_path_factory.mktemp("whole"))
    summary = trainer.fit()
    assert summary["best_top1"] == trainer.checkpoints.best[0][0]  # the average's: what best-*.pt are chosen by
    assert summary["best_top1"] == max(line["ema_top1"] for line in trainer.metrics.read())
    return trainer.folder


def test_a_resumed_run_ends_as_an_uninterrupted_one(whole, tmp_path):
    """Stopped in the second of two epochs: weights, their average and metrics are the same."""

    class Stop(Exception):
        pass

    def stop(trainer):
        if trainer.step == trainer.steps_per_epoch + 2:
            raise Stop

    cut = averaged(tmp_path)
    cut.on_step.append(stop)
    with pytest.raises(Stop):
        cut.fit()
    again = averaged(tmp_path)
    again.resume()
    assert again.step == again.steps_per_epoch
    again.fit()
    assert differences(outcome(whole), outcome(tmp_path)) == []
    again.config.recipe.lr = 1.0
    with pytest.raises(ConfigError, match=r"recipe\.lr"):
        Trainer(again.config, tmp_path, ALONE).resume()


# The model's evaluation in the first epoch, its average's there, and the average's in the last epoch.
@pytest.mark.parametrize("which, signalled", paired([0, 1, 3], [False, True]))
def test_a_run_stopped_in_an_evaluation_has_lost_nothing(which, signalled, whole, tmp_path):
    """By a kill, or by a signal that is acted on between the batches."""
    cut = averaged(tmp_path)
    images = cut.data.eval_samples.images
    loaded, load = itertools.count(), images.load

    def stopping(index):
        evaluation, place = divmod(next(loaded), len(images))
        assert (evaluation, place) < (which, 256), "goes on though it was asked to stop"
        if (evaluation, place) == (which, 100) and signalled:  # in the first of two batches
            os.kill(os.getpid(), signal.SIGTERM)
        elif (evaluation, place) == (which, 100):
            raise InterruptedError
        return load(index)

    images.load = stopping
    with pytest.raises(SystemExit if signalled else InterruptedError):
        cut.fit()
    assert len(cut.metrics.read()) == which // 2
    again = averaged(tmp_path)
    again.resume()
    assert again.step == again.steps_per_epoch * (1 + which // 2)
    again.fit()
    assert differences(outcome(whole), outcome(tmp_path)) == []
    assert all(line["images_per_second"] > 0 for line in again.metrics.read())


def test_a_summary_names_every_device_that_a_run_was_trained_on(tmp_path):
    trainer = averaged(tmp_path)
    assert trainer.world.device_name == "cpu"
    line = {"top1": 50.0, "eval_samples": 20, "images_per_second": 1.0}
    lines = [line, *({**line, "device": device} for device in ("H100", "H100", "cpu"))]  # the first of an older version
    assert summarize(trainer.config, trainer.model, [line], "A100")["device"] == "A100"
    assert summarize(trainer.config, trainer.model, lines)["device"] == "unknown then H100 then cpu"


@pytest.mark.parametrize("damaged", ['{"top1": ', "[]", "{}"])
def test_a_damaged_summary_of_a_finished_run_is_written_anew(damaged, tmp_path):
    first = averaged(tmp_path)
    first.fit()
    whole = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(damaged)
    again = averaged(tmp_path)
    again.resume()
    again.fit()
    assert json.loads((tmp_path / "summary.json").read_text()) == whole


@pytest.fixture
def images(tmp_path):
    """A folder of images; a run of one epoch was trained on it."""
    from PIL import Image

    root = tmp_path / "images"
    for split, name, number in itertools.product(("train", "val"), ("cat", "dog"), range(4)):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number * 50, 0, 0)).save(root / split / name / f"{name}{number}.png")
    (tmp_path / "run").mkdir()
    on(root).fit()
    return root


def on(root):
    small = ("data=folder", f"data.root={root}", "recipe=digits", "recipe.batch_size=4", "data.train_images=null")
    made = config(*TINY, *NARROW, *small, *TINY[:2])
    return Trainer(made, root.parent / "run", ALONE)


@pytest.mark.parametrize("change, words", [
    (lambda root: (root / "train/cat/cat3.png").unlink(), r"8 training images \(now 7\)"),
    (lambda root: (root / "val/cat/cat3.png").unlink(), r"8 evaluation images \(now 7\)"),
    (lambda root: (root / "train/cat/cat3.png").rename(root / "train/cat/cat9.png"), "other names of training"),
    (lambda root: [(root / s / "cat").rename(root / s / "bat") for s in ("train", "val")], "classes .*2: bat, dog"),
])  # fmt: skip
def test_a_run_does_not_go_on_with_other_data(change, words, images):
    change(images)
    with pytest.raises(ConfigError, match=rf"data\.root=.*{words}"):
        on(images).resume()


def test_a_run_goes_on_with_data_that_was_moved_and_from_a_checkpoint_that_does_not_know_its_data(images):
    moved = on(images.rename(images.with_name("moved")))
    moved.resume()
    assert moved.step == moved.steps
    last = moved.checkpoints.folder / "last.pt"
    torch.save({key: value for key, value in read(last).items() if key not in ("data", "unevaluated")}, last)
    old = on(images.with_name("moved"))
    old.resume()
    assert old.step == old.steps


def test_precision_is_in_a_runs_name_and_cannot_change(tmp_path):
    from train.config import learnt_settings

    launch("-m", "runtime.precision=float32,bfloat16", cwd=tmp_path)
    runs = {read(path)["config"]["runtime"]["precision"]: path.parents[1] for path in tmp_path.rglob("last.pt")}
    assert runs.keys() == {"float32", "bfloat16"}
    with pytest.raises(ConfigError, match=r"runtime\.precision=bfloat16, now it is float32"):
        Trainer(config(*TINY, *NARROW), runs["bfloat16"], ALONE).resume()
    assert learnt_settings(config()) != learnt_settings(config("runtime.sync_norm=true"))
    assert learnt_settings(config()) == learnt_settings(config("runtime.micro_batch=8", "runtime.compile=true"))


def test_signals_are_noted_within_the_fit_alone(tmp_path):
    from train.jobs.signals import SIGNALS, StopRequest

    before = [signal.getsignal(number) for number in SIGNALS]
    Trainer(config(*TINY, *NARROW), tmp_path, ALONE)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with StopRequest() as stop:
        for number in SIGNALS:
            signal.raise_signal(number)
            assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with StopRequest(alone=False) as stop:  # the terminal's, and the launcher's
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    kept = Checkpoints(tmp_path)
    kept.save({"format": FORMAT, "step": 1})
    kept.save({"format": FORMAT, "step": 2})
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 truncated")
    path, state, remarks = newest(tmp_path)
    assert state["step"] == 1 and path.name == "previous.pt" and "last.pt" in remarks[0]
    (tmp_path / "previous.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read.*last\.pt.*previous\.pt"):
        newest(tmp_path)


def test_a_foreign_checkpoint_is_passed_over_and_named(tmp_path):
    torch.save({"model": {}, "best": 0.7}, tmp_path / "fresh.pt")
    with pytest.raises(CheckpointError, match=r"fresh\.pt is not a checkpoint of a run"):
        Checkpoints(tmp_path).newest()
    Checkpoints(tmp_path / "run").save({"format": FORMAT, "step": 1})
    torch.save({"model": {}}, tmp_path / "run" / "fresh.pt")
    assert newest(tmp_path / "run").state["step"] == 1


def test_reading_checkpoints_changes_nothing_and_going_on_keeps_the_best(tmp_path):
    """As left by a kill after an epoch's checkpoint was written and before it was kept as the best."""
    kept = Checkpoints(tmp_path)
    kept.save_epoch({"format": FORMAT}, 0, 50.0)
    kept.save({"format": FORMAT, "epoch": 1})
    state = read(tmp_path / "last.pt")
    torch.save({**state, "best": [(60.0, 1)]}, tmp_path / "fresh.pt")
    before = sorted(path.name for path in tmp_path.iterdir())
    again = Checkpoints(tmp_path)
    found = again.newest()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    again.resume_from(found)
    assert again.best == [(60.0, 1)]
    assert [path.name for path in tmp_path.glob("best-*.pt")] == ["best-0001.pt"]
    assert Checkpoints(tmp_path / "none").newest() is None


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"step": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        read(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_the_split_or_with_a_broken_image_is_named(tmp_path):
    from PIL import Image

    missing = launch("data=folder", f"data.root={tmp_path}", cwd=tmp_path, check=False)
    assert missing.returncode != 0 and "'train'" in missing.stderr and "Traceback" not in missing.stderr
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(4):
                Image.new("RGB", (20, 20), (k * 50, 0, 0)).save(tmp_path / split / name / f"{k}.png")
    small = ["data=folder", f"data.root={tmp_path}", "recipe.batch_size=4", "data.train_images=null", "name=f"]
    launch(*small, cwd=tmp_path)
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"no image")
    broken = launch(*small, "seed=1", cwd=tmp_path, check=False)
    assert broken.returncode != 0 and "2.png" in broken.stderr and "Traceback" not in broken.stderr


@pytest.fixture(scope="module")
def thousand_classes(tmp_path_factory):
    """As ImageNet lies on a disk: a thousand classes, an image each."""
    from PIL import Image

    root = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "val"):
        for number in range(1000):
            (root / split / f"n{number:04d}").mkdir(parents=True)
            Image.new("RGB", (40, 30), (number % 256, 90, 200)).save(root / split / f"n{number:04d}" / "a.png")
    return root


FIRST_STEPS = ["resnet18_kw1d4x", "resnet50_kw1d2x", "convnext_tiny_kw1x", "mobilenetv2_100_kw4x",
               "mobilenetv2_050_kw1d2x", "deit_tiny_kw4x"]  # fmt: skip


# Of each family the smaller one always.
@pytest.mark.parametrize(
    "row", representative(FIRST_STEPS, lambda row: not row.startswith(("resnet50", "mobilenetv2_100")))
)
def test_a_published_row_takes_its_first_steps(row, thousand_classes, tmp_path):
    """All settings as published, but for the batch."""
    from train.data.loader import train_loader

    made = config(f"experiment={row}", f"data.root={thousand_classes}", "recipe.batch_size=4", "runtime.device=cpu")
    trainer = Trainer(made, tmp_path, ALONE)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    steps = 2 if made.recipe.warmup_from_zero else 1  # the first is then of rate 0
    batches = MicroBatches(1000, batch_size=4, accumulation=1, steps=steps, seed=0)
    trainer.model.train()
    loaded = iter(train_loader(trainer.data.train_samples, batches, 0, False))
    for _ in range(steps):
        trainer.train_step(loaded)
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert trainer.step == steps and sum(moved) > 0.5 * len(
        moved
    )  # drop path leaves some blocks out of so small a batch
