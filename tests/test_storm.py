"""`python -m scripts.storm`: what counts as survived; its random settings; its damaged files. `make storm` runs it."""

import os
import random
import sys

import pytest

from scripts.storm import files, settings
from scripts.storm.__main__ import main
from scripts.storm.kills import below
from scripts.storm.trials import Ended, Row, forked, is_kind


@pytest.mark.parametrize(
    ("ended", "wrong"),
    [
        (Ended(0, "done"), None),
        (Ended(None, "still training"), None),
        (Ended(1, "ConfigError: n=3/7"), None),
        (Ended(1, ""), "without a word"),
        (Ended(-9, "killed"), "signal 9"),
        (Ended(1, "Traceback (most recent call last):\n  File ...\nKeyError: 'n'"), "a traceback, KeyError: 'n'"),
    ],
)
def test_a_run_or_an_error_of_one_line_is_survived(ended, wrong):
    found = is_kind(ended)
    assert found is wrong is None or wrong in found


def test_a_fault_that_must_be_noticed_is_not_survived_by_a_run():
    assert is_kind(Ended(0, ""), may_run=False) == "no error"


@pytest.mark.parametrize(
    ("work", "ended"),
    [
        (lambda: print("hello"), Ended(0, "hello\n")),
        (lambda: sys.exit("ConfigError: n"), Ended(1, "ConfigError: n\n")),
        (lambda: sys.exit(3), Ended(3, "")),
        (lambda: os.kill(os.getpid(), 9), Ended(-9, "")),
    ],
)
def test_a_fork_ends_like_a_program(work, ended):
    assert forked(work) == ended


def test_an_error_in_a_fork_shows_its_traceback():
    wrong = is_kind(forked(lambda: {}["n"]))
    assert wrong.startswith("a traceback, ") and wrong.endswith("KeyError: 'n'")


def test_random_settings_are_the_same_for_a_seed_and_of_every_kind():
    drawn = [
        [settings.word_of(chance, ["recipe.lr", "n"], ["backbone"]) for _ in range(200)]
        for chance in (random.Random(3), random.Random(3))
    ]
    assert drawn[0] == drawn[1]
    assert any(word.startswith("backbone=") for word in drawn[0]) and set(settings.ODD) & set(drawn[0])
    assert any(word.partition("=")[0] not in ("recipe.lr", "n", "backbone") for word in drawn[0])


def test_damaged_checkpoints_differ_from_the_good_one(tmp_path):
    (tmp_path / "good.pt").write_bytes(os.urandom(4000))
    made = files.damages(tmp_path / "good.pt", tmp_path / "mark", random.Random(0))
    assert len(set(made.values())) == len(made) == 10 and (tmp_path / "good.pt").read_bytes() not in made.values()


def test_processes_below_one_are_found():
    assert below(os.getpid())[0] == os.getpid()


def test_the_table_says_what_was_tried_survived_and_wrong(capsys, monkeypatch):
    row = Row("random settings")
    row.add("n=x", None)
    row.add("n=y", "a traceback")
    monkeypatch.setattr(settings, "misconfigure", lambda *_: row)
    with pytest.raises(SystemExit) as leaving:
        main(["--only", "settings"])
    out = capsys.readouterr().out
    assert leaving.value.code == 1 and "random settings: n=y: a traceback" in out and "│ 2 " in out
