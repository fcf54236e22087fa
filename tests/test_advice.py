"""Hydra's refusals of a command line: one line, with the nearest name."""

import sys

import pytest

import train.__main__ as entry
from train.jobs.command import Jobs


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """What the command says as it ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as the command does, but for this test

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["train", *words])
        monkeypatch.setattr(entry, "jobs", Jobs())
        with pytest.raises(SystemExit) as left:
            entry.jobs.run(entry.main, "train")
        assert "\n" not in str(left.value)
        return str(left.value)

    return run


@pytest.mark.parametrize("words, near", [
    (["recipe.lrr=1"], "recipe.lrr: there is no such key. Did you mean recipe.lr or recipe.min_lr or recipe?"),
    (["lr=1"], "lr: there is no such key. Did you mean recipe.lr?"),
    (["-m", "recipe.augment.hflop=0,1"], "Did you mean recipe.augment.hflip or"),
    (["bakbone=resnet18"], "bakbone: there is no such key. Did you mean backbone or"),
    (["backbone=resnet19"], "Did you mean resnet18 or"),
    (["experiment=resnet18_kw1d3x"], "Did you mean resnet18_kw1"),
    (["-m", "hydra/launcher=slum"], "Did you mean slurm?"),
    (["hydra.swep.dir=x"], "Did you mean hydra.sweep.dir"),
    (["recipe=null"], "A group of settings, such as recipe or data, must have the name of an option"),
])  # fmt: skip
def test_a_mistyped_name_gets_the_nearest_ones(words, near, refused):
    assert near in refused(*words)


@pytest.mark.parametrize("words, said", [
    (["recipe.lr=abc"], "ConfigError: Error merging override recipe.lr=abc: Value 'abc' of type 'str' could not be "
                        "converted to Float."),
    (["n=[1"], "ConfigError: no viable alternative at input '[1'."),
    (["~recipe.lrr"], "ConfigError: Could not delete from config. 'recipe.lrr' does not exist."),
])  # fmt: skip
def test_other_refusals_are_one_line(words, said, refused):
    assert refused(*words) == said


def test_a_key_that_is_added_is_unknown_too(refused, capsys):
    refused("+recipe.foo=1")
    assert capsys.readouterr().err == "ConfigError: Key 'foo' not in 'RecipeConfig' (recipe.foo)\n"
