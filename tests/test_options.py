"""Every switch of recipe and runtime that changes how a run computes: it trains, and does what it says."""

import errno
import os

import pytest
import torch
from helpers import programs
from helpers.selection import paired
from helpers.training import ALONE, NARROW, TINY, config
from timm.layers import DropPath
from torch import nn

from kw.layers import KWLayer
from train.data.digits import Digits
from train.data.loader import Loaded
from train.data.substitutes import Substitutes
from train.jobs.checkpoints import Checkpoints
from train.jobs.errors import ConfigError, NonFiniteError, RunError, WriteError
from train.jobs.folder import write_atomically
from train.jobs.metrics import MetricsFile
from train.model import build_model, load_weights
from train.optim import build_optimizer
from train.run import run
from train.trainer import Trainer


def train(folder, *settings):
    folder.mkdir()
    trainer = Trainer(config(*TINY, *NARROW, *settings), folder, ALONE)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    line = trainer.fit()
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert not any(torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
    return trainer, line


@pytest.mark.parametrize("precision, clip", paired(["bfloat16", "float16"], ["null", "1.0"]))
def test_half_precision_learns_what_float32_does(precision, clip, tmp_path):
    losses = []
    for name in ("float32", precision):
        trainer, _ = train(tmp_path / name, f"runtime.precision={name}", f"recipe.clip_grad={clip}")
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        losses.append(trainer.metrics.read()[0]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_float16_passes_over_steps_that_overflow_and_scales_back(clip, tmp_path):
    trainer = Trainer(config(*TINY, *NARROW, "runtime.precision=float16", f"recipe.clip_grad={clip}"), tmp_path, ALONE)
    trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)  # far too large
    trainer.fit()
    assert trainer.learner.scaler.get_scale() < 2.0**120
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def test_float16_refuses_gradients_that_no_scale_makes_finite(tmp_path):
    settings = ("runtime.precision=float16", "recipe.batch_size=8")  # 40 steps
    trainer = Trainer(config(*TINY, *NARROW, *settings), tmp_path, ALONE)
    weight = next(trainer.model.parameters())
    weight.register_hook(lambda gradient: gradient * torch.nan)
    before = weight.clone()
    with pytest.raises(NonFiniteError, match=r"^Step 16: loss \d.*gradient norm nan"):  # the scale begins at 2**16
        trainer.fit()
    assert trainer.learner.scaler.get_scale() == 0.25  # halved by that step, and by the next one
    assert torch.equal(weight, before)


def test_clipping_bounds_what_reaches_the_optimizer(tmp_path):
    trainer = Trainer(config(*TINY, *NARROW, "recipe.clip_grad=0.01"), tmp_path, ALONE)
    norms = []
    step = trainer.learner.optimizer.step

    def noting(*arguments, **more):
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients).item())
        return step(*arguments, **more)

    trainer.learner.optimizer.step = noting
    trainer.fit()
    assert len(norms) == trainer.steps and max(norms) <= 0.01 * (1 + 1e-4)


def test_channels_last_changes_rounding_alone(tmp_path):
    losses = []
    for value in ("false", "true"):
        trainer, _ = train(tmp_path / value, f"runtime.channels_last={value}")
        losses.append(trainer.metrics.read()[0]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tmp_path):
    losses = []
    for value in ("false", "true"):
        trainer, _ = train(tmp_path / value, f"runtime.compile={value}")
        assert not any("_orig_mod" in name for name in trainer.state()["model"])
        losses.append(trainer.metrics.read()[0]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_sync_norm_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"runtime\.sync_norm"):
        run(config("runtime.sync_norm=true", "runtime.device=cpu"), tmp_path)


def drop_rates(*settings):
    with torch.device("meta"):
        model = build_model(config("data=imagenet", "data.root=x", *settings), 10)
    return [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]


@pytest.mark.parametrize("n", ["static", "1"])
def test_drop_path_is_constant_in_resnets_and_rises_in_others(n):
    assert drop_rates("backbone=resnet18", f"n={n}", "recipe.drop_path=0.2") == [0.2] * 8
    rising = drop_rates("backbone=convnext_tiny", f"n={n}", "recipe.drop_path=0.2")
    assert rising == sorted(rising) and rising[-1] == pytest.approx(0.2) and rising[0] < 0.02


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_tiny", "deit_tiny_patch16_224", "mobilenetv2_050"])
def test_the_rule_of_drop_path_can_be_set(backbone):
    settings = (f"backbone={backbone}", "n=1", "recipe.drop_path=0.2")
    assert set(drop_rates(*settings, "recipe.drop_path_rule=constant")) == {0.2}
    rising = drop_rates(*settings, "recipe.drop_path_rule=linear")
    assert rising == sorted(rising) and (rising[0], rising[-1]) == (0, 0.2) and len(set(rising)) > 7
    with pytest.raises(ConfigError, match=r"recipe\.drop_path_rule"):
        config("recipe.drop_path_rule=steep")


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_tiny", "deit_tiny_patch16_224", "mobilenetv2_050"])
def test_under_layer_decay_cells_learn_as_fast_as_the_first_layer_that_uses_them(backbone):
    made = config(f"backbone={backbone}", "data=imagenet", "data.root=x", "n=1", "recipe.layer_decay=0.8")
    model = build_model(made, 10)
    groups = build_optimizer(model, made.recipe).param_groups
    scale = {p: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale.keys() == set(model.parameters())
    assert sum(len(group["params"]) for group in groups) == len(scale)  # none twice
    by_cells = {}
    for layer in model.modules():
        if isinstance(layer, KWLayer):
            by_cells.setdefault(layer.warehouse.cells, []).append(scale[layer.attention.fc1.weight])
    assert all(scale[cells] == scales[0] for cells, scales in by_cells.items())
    assert len({scale[cells] for cells in by_cells}) > 1
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert all(decays[cells] == made.recipe.weight_decay for cells in by_cells)


def test_layer_decay_reaches_the_steps(tmp_path):
    trainer, _ = train(tmp_path / "run", "recipe.layer_decay=0.5", "recipe.schedule=constant")
    rates = {group["lr"] for group in trainer.learner.optimizer.param_groups}
    assert max(rates) == trainer.config.recipe.lr and min(rates) < 0.1 * max(rates)


@pytest.mark.parametrize("keep, kept", [(0, []), (1, [2]), (2, [0, 2]), (9, [0, 1, 2, 3])])
def test_the_last_and_the_best_few_are_kept(keep, kept, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep)
    for epoch, score in enumerate([50.0, 10.0, 70.0, 30.0]):
        checkpoints.save_epoch({"step": epoch}, epoch, score)
    names = {f"best-{epoch:04d}.pt" for epoch in kept} | {"last.pt", "previous.pt"}
    assert {path.name for path in tmp_path.iterdir()} == names


def start(folder, *settings, limit=None):
    words = (*TINY, *NARROW, *settings, f"hydra.run.dir={folder}")
    return programs.run("train", *words, code=None, largest_file=limit)


def test_a_disk_that_is_full_is_reported_and_loses_nothing(tmp_path):
    """A limit on the size of files stands for a full disk: it, too, fails in the midst of writing."""
    assert start(tmp_path, "recipe.epochs=1").returncode == 0
    saved = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    full = start(tmp_path, "recipe.epochs=1", "recipe.lr=0.01", "label=x")
    assert full.returncode == 1 and "recipe.lr" in full.stderr  # other settings: the run that is there is kept
    fresh = tmp_path / "full"
    full = start(fresh, limit=50_000)
    assert full.returncode == 1
    assert "last.pt could not be written" in full.stderr or "fresh.pt could not be written" in full.stderr
    assert "File too large" in full.stderr  # not torch's "unexpected pos"
    assert "Traceback" not in full.stderr
    assert not list(fresh.rglob("*.tmp"))
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == saved
    assert start(fresh).returncode == 0  # there is space again


def _full(number):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_each_file_that_a_full_disk_does_not_take_is_named(tmp_path, monkeypatch):
    write_atomically(tmp_path / "config.yaml", "before")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(WriteError, match=r"config\.yaml could not be written: No space left"):
        write_atomically(tmp_path / "config.yaml", "after")
    assert (tmp_path / "config.yaml").read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(WriteError, match=r"metrics\.jsonl could not be written: No space left"):
        MetricsFile(tmp_path / "metrics.jsonl").append({"epoch": 0})
    broken = Loaded(image=torch.zeros(1), target=0, index=[1], epoch=[0], copy=[0], used=[2])
    with pytest.raises(WriteError, match=r"substituted/3\.txt could not be written: No space left"):
        Substitutes(tmp_path, Digits("val"), rank=3).record(broken)
    assert not WriteError.everywhere  # whichever process it is says so


def test_a_folder_that_cannot_be_made_or_linked_in_is_named(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(WriteError, match="checkpoints could not be written"):
        Checkpoints(tmp_path / "checkpoints").save({})
    monkeypatch.setattr(os, "link", lambda *_: _full(0))
    with pytest.raises(WriteError, match=r"best-0000\.pt could not be written: No space left"):
        Checkpoints(tmp_path / "full").save_epoch({}, 0, 50.0)


def test_a_disk_that_is_full_at_the_start_is_reported(tmp_path):
    full = start(tmp_path, limit=1000)  # room for the message, which goes to a file, too
    assert full.returncode == 1 and "could not be written" in full.stderr
    assert "config.yaml" in full.stderr and "Traceback" not in full.stderr


def test_a_finished_run_without_its_metrics_says_so(tmp_path):
    train(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    again = Trainer(config(*TINY, *NARROW), tmp_path / "run", ALONE)
    again.resume()
    with pytest.raises(RunError, match=r"metrics\.jsonl has no line"):
        again.fit()


def test_weights_from_when_cells_had_names_of_their_own_are_refused_with_that_reason():
    made = config("backbone=resnet18", "data=imagenet", "data.root=x", "n=1")
    model = build_model(made, 10)
    weights = {
        ("warehouses.stage0.cells" if key.endswith("cells") else key): v for key, v in model.state_dict().items()
    }
    with pytest.raises(ValueError, match="earlier version"):
        load_weights(model, weights)
    load_weights(model, model.state_dict())
