"""Training that starts from a trained static model (`start_from`)."""

import re
import shutil

import pytest
import torch
from helpers.training import ALONE, NARROW, TINY, config

import kw
from kw.baselines.fdconv import FDConv2d
from scripts.kill_storm import differences, outcome
from train.jobs.errors import CheckpointError, ConfigError
from train.trainer import Trainer


def trainer(folder, *overrides):
    folder.mkdir(exist_ok=True)
    return Trainer(config(*TINY, *NARROW, "recipe.temperature_epochs=0.5", *overrides), folder, ALONE)


def started(folder, source, *overrides):
    """A trainer that is ready to `fit`, with an average of the weights."""
    made = trainer(folder, f"start_from={source}", "recipe.ema_decay=0.9", *overrides)
    made.resume()
    return made


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """A run of the static model."""
    made = trainer(tmp_path_factory.mktemp("static"), "n=static")
    made.fit()
    return made


@pytest.fixture(scope="module", params=["run folder", "checkpoint", "state dict", "state dict of timm"])
def source(request, static, tmp_path_factory):
    """What `start_from` may name, all with the weights of that run."""
    path = tmp_path_factory.mktemp("source") / "weights.pt"
    weights = static.model.state_dict()
    if request.param == "run folder":
        return static.folder
    if request.param == "checkpoint":
        return static.checkpoints.folder / "last.pt"
    torch.save(weights if request.param == "state dict" else {"epoch": 3, "state_dict": weights}, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2])
def test_model_and_average_begin_with_what_the_static_model_computes(n, source, static, tmp_path, capsys):
    made = started(tmp_path, source, f"n={n}")
    at_0 = made.evaluate(made.model)
    assert f"Started from {source}: top-1 {at_0['top1']:.2f} before training" in capsys.readouterr().out
    expected = made.evaluate(static.model)
    x = torch.randn(4, 3, 16, 16)
    for model in (made.model, made.ema.module):
        kw.set_temperature(model, 1)
        torch.testing.assert_close(model.eval()(x), static.model.eval()(x), rtol=1e-4, atol=1e-5)
        assert made.evaluate(model) == pytest.approx(expected, rel=1e-4)


def test_a_static_run_trains_on_from_the_weights(static, tmp_path):
    made = started(tmp_path, static.folder, "n=static")
    begun = {key: value.clone() for key, value in made.model.state_dict().items()}
    for state in (begun, made.ema.module.state_dict()):
        torch.testing.assert_close(state, static.model.state_dict(), rtol=0, atol=0)
    assert made.fit()["epochs"] == 1
    assert not any(torch.equal(p, begun[name]) for name, p in made.model.named_parameters())


def test_fdconv_starts_from_the_kernels_of_a_static_run(static, tmp_path):
    channels = "backbone.kwargs.channels=[32,32,32,32]"
    source = trainer(tmp_path / "static", "n=static", channels)
    source.fit()
    made = started(tmp_path / "run", source.folder, "dynamic=fdconv", channels)
    kernels = source.model.state_dict()
    layers = {name: m for name, m in made.model.named_modules() if isinstance(m, FDConv2d) and m.attention is not None}
    assert layers
    for name, layer in layers.items():
        torch.testing.assert_close(layer.weight, layer._spectrum(kernels[f"{name}.weight"]))
    assert made.fit()["epochs"] == 1


def test_an_interrupted_run_goes_on_without_what_it_started_from(static, tmp_path):
    source = shutil.copytree(static.folder, tmp_path / "source")
    settings = ("n=1", "runtime.checkpoint_steps=2")
    whole = started(tmp_path / "whole", source, *settings)
    whole.fit()

    class Stop(Exception):
        pass

    def stop(made):
        if made.step == 3:
            raise Stop

    cut = started(tmp_path / "cut", source, *settings)
    cut.on_step.append(stop)
    with pytest.raises(Stop):
        cut.fit()
    shutil.rmtree(source)
    again = started(tmp_path / "cut", source, *settings)
    assert again.step == 2
    again.fit()
    assert differences(outcome(whole.folder), outcome(again.folder)) == []
    with pytest.raises(ConfigError, match="start_from"):
        started(tmp_path / "cut", static.folder, *settings)


def test_without_start_from_nothing_is_read(static, tmp_path):
    made = trainer(tmp_path, "n=static")
    made.resume()
    assert any(not torch.equal(p, q) for p, q in zip(made.model.parameters(), static.model.parameters(), strict=True))


REFUSED = {
    "too few cells": (["n=1/2"], lambda weights: weights, "n=1/2 has fewer cells"),
    "no anchors": (["kw.anchoring=none"], lambda weights: weights, "one anchor for each mixture"),
    "another width": ([NARROW[0].replace("16", "24")], lambda weights: weights, r"has shape \(.*\), not \("),
    "left over": ([], lambda weights: weights | {"more": torch.zeros(1)}, "'more' is left over"),
    "missing": ([], lambda weights: dict(list(weights.items())[1:]), "'.*' is missing"),
    "no weights": ([], lambda weights: {"epoch": 3}, "'epoch' in it is no tensor"),
}


@pytest.mark.parametrize("overrides, change, words", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_that_says_why(overrides, change, words, static, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(change(dict(static.model.state_dict())), path)
    with pytest.raises(CheckpointError, match=rf"start_from={re.escape(str(path))} .*{words}") as refused:
        started(tmp_path / "run", path, *overrides)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_read_or_is_dynamic_is_refused(static, tmp_path):
    (tmp_path / "empty").mkdir()
    dynamic = trainer(tmp_path / "dynamic", "n=1")
    dynamic.fit()
    for path, words in (("gone.pt", "does not exist"), ("empty", "no checkpoint"), ("dynamic", "left over")):
        with pytest.raises(CheckpointError, match=words) as refused:
            started(tmp_path / "run", tmp_path / path)
        assert path in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["odconv", "se"])
def test_other_methods_are_refused_before_anything_is_read(method):
    with pytest.raises(ConfigError, match=rf"start_from='gone'.*dynamic=kw, static, fdconv; {method} has no place"):
        config(f"dynamic={method}", "start_from=gone")
    for method in ("static", "fdconv"):
        assert config(f"dynamic={method}", "start_from=gone").start_from == "gone"
