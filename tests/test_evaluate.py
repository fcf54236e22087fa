"""Which data a checkpoint is evaluated on: its own, but for what the command line says."""

import pytest
import torch
from helpers.training import NARROW, TINY, config
from PIL import Image

import kw
from train.config import unused_in_evaluation, unused_in_training
from train.config.saved import to_plain
from train.evaluate import data_settings, evaluate_checkpoint
from train.jobs.checkpoints import newest_or_warn
from train.jobs.errors import ConfigError
from train.jobs.reading import FORMAT
from train.jobs.world import World
from train.model import build_model
from train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))


def images(root, count):
    for split, files in (("train", 8), ("val", count)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for k in range(files):
                Image.new("RGB", (20, 20), (k * 20, 0, 0)).save(root / split / name / f"{k}.png")
    return str(root)


def overridden(*overrides):
    """The configuration of a command line, and its keys."""
    return config(*overrides), [word.partition("=")[0] for word in overrides]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images of 16 pixels in a folder."""
    root = tmp_path_factory.mktemp("run")
    data = ("data=folder", f"data.root={images(root / 'a', 3)}", "recipe=digits", "data.mean=[0.1,0.2,0.3]")
    made = config(
        *TINY, *data, *NARROW, "recipe.batch_size=8", "data.train_images=null", "n=static", "runtime.device=cpu"
    )
    (root / "run").mkdir()
    Trainer(made, root / "run", ALONE).fit()
    return root / "run"


def test_data_keys_are_laid_over_the_saved_settings(run, tmp_path):
    other = images(tmp_path / "b", 5)
    found = evaluate_checkpoint(*overridden(f"evaluate={run}", f"data.root={other}"), ALONE)
    assert (found["data"], found["root"], found["split"], found["image_size"]) == ("folder", other, "val", 16)
    assert found["eval_samples"] == 10
    found = evaluate_checkpoint(*overridden(f"evaluate={run}", "data.eval_split=train"), ALONE)
    assert (found["split"], found["image_size"], found["eval_samples"]) == ("train", 16, 16)


def test_a_data_group_keeps_the_saved_size_and_normalization(run, tmp_path):
    other = ("data=folder", f"data.root={images(tmp_path / 'b', 5)}")
    found = evaluate_checkpoint(*overridden(f"evaluate={run}", *other), ALONE)
    assert (found["image_size"], found["eval_samples"]) == (16, 10)
    found = evaluate_checkpoint(*overridden(f"evaluate={run}", *other, "data.image_size=24"), ALONE)
    assert found["image_size"] == 24
    saved = config("data=folder", "data.root=x", "data.mean=[0.1,0.2,0.3]", "data.image_size=16").data
    group, typed = overridden("data=cifar10", "data.root=y", "data.std=[1,1,1]")
    made = data_settings(saved, group.data, typed)
    assert (made.mean, made.std, made.eval_split) == ([0.1, 0.2, 0.3], [1, 1, 1], "test")


def test_a_root_for_the_digits_is_refused():
    made, typed = overridden("data.root=x")
    with pytest.raises(ConfigError, match=r"data\.root='x'"):
        data_settings(config().data, made.data, typed)


@pytest.mark.parametrize("word", ["data.train_images=10", "runtime.compile=true", "logger=wandb", "logger.mode=online"])
def test_what_an_evaluation_does_not_use_is_refused(run, word):
    with pytest.raises(ConfigError, match=f"does not use {word.partition('=')[0]}: leave it out"):
        evaluate_checkpoint(*overridden(f"evaluate={run}", word), ALONE)


def test_what_an_evaluation_of_a_released_checkpoint_does_not_use_is_told():
    typed = ["n", "recipe.lr", "recipe.augment.eval_resize", "seed", "data.root", "data.train_split", "recipe"]
    assert unused_in_evaluation(typed) == ["recipe.lr", "seed", "data.train_split"]


def test_what_a_training_does_not_use_is_told():
    typed = ["recipe.decay_rate", "recipe.min_lr", "data.root", "recipe.lr", "logger.mode"]
    assert unused_in_training(config("recipe.schedule=cosine"), typed) == [
        "recipe.decay_rate is not used with recipe.schedule=cosine.",
        "data.root is not used with data.format=digits.",
        "logger.mode is not used with logger.services=[].",
    ]
    used = config("recipe.schedule=step", "data=folder", "data.root=x", "logger=both")
    assert unused_in_training(used, typed) == ["recipe.min_lr is not used with recipe.schedule=step."]


def checkpoint(path):
    """A checkpoint of a model for digits at n = 1, not trained."""
    made = config(*TINY, *NARROW)
    torch.manual_seed(0)
    model = build_model(made, 10)
    kw.set_temperature(model, 0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # the last one of a block begins at 0, and hides its layers
            module.momentum = 1.0
    model(torch.randn(64, 3, 16, 16))
    state = {"format": FORMAT, "model": model.state_dict(), "ema": None, "config": to_plain(made)}
    torch.save({**state, "classes": [str(k) for k in range(10)]}, path)
    return path


def test_a_frozen_model_is_evaluated_with_its_cells_in_other_types(tmp_path):
    found, path = {}, checkpoint(tmp_path / "last.pt")
    for word in ((), ("freeze=float32",), ("freeze=bfloat16",), ("freeze=int8",)):
        found[word] = evaluate_checkpoint(*overridden(f"evaluate={path}", *word), ALONE)
    usual, same, half, eight = found.values()
    assert "freeze" not in usual and same["freeze"] == "float32"
    assert same["eval_loss"] == pytest.approx(usual["eval_loss"], rel=1e-5) and same["top1"] == usual["top1"]
    assert half["eval_loss"] != same["eval_loss"] == pytest.approx(half["eval_loss"], rel=0.2)
    assert eight["eval_loss"] not in (same["eval_loss"], half["eval_loss"])
    assert eight["megabytes"] < half["megabytes"] < same["megabytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evaluate={run}", "freeze=int8"), "freeze='int8': the model has no KernelWarehouse layer"),
        (("evaluate={run}", "freeze=int4"), "freeze='int4'.*float32, bfloat16, int8"),
        (("freeze=int8",), "freeze='int8': needs evaluate="),
    ],
)
def test_what_cannot_be_frozen_is_refused(words, said, run):
    with pytest.raises(ConfigError, match=said):
        evaluate_checkpoint(*overridden(*(word.format(run=run) for word in words)), ALONE)


def test_a_damaged_newest_checkpoint_is_told_when_an_earlier_one_is_read(tmp_path, capsys):
    for name in ("last.pt", "previous.pt"):
        torch.save({"format": FORMAT, "name": name}, tmp_path / name)
    assert newest_or_warn(tmp_path)[0].name == "last.pt"
    (tmp_path / "last.pt").write_bytes(b"cut off")
    path, state = newest_or_warn(tmp_path)
    assert "last.pt is damaged" in (told := capsys.readouterr().err) and "previous.pt is read in its" in told
    assert (path.name, state["name"]) == ("previous.pt", "previous.pt")
