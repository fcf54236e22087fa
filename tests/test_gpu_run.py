"""`python -m scripts.gpu`: it goes on after a failure, writes a summary after each part, and keeps to its time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.gpu import __main__ as entry
from scripts.gpu.parts import Part, Run, parts_of

PARTS = ["exactness", "trainer", "detection", "prices", "graphs", "benchmark", "profile", "blocks", "training"]


def code(text):
    return lambda limit: [sys.executable, "-c", text]


@pytest.fixture
def go(monkeypatch, tmp_path):
    """Run these parts in place of the real ones; the exit status and the summary's parts by name."""
    out = tmp_path / "report"

    def run(*parts, **options):
        monkeypatch.setattr(entry, "parts_of", lambda run: list(parts))
        monkeypatch.setattr(entry, "install_wheels", lambda folder: None)
        monkeypatch.setattr(entry, "import_problem", lambda environment: None)  # it takes seconds
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        status = entry.main(["--dry", "--out", str(out), *words])
        parts = json.loads((out / "summary.json").read_text())["parts"]
        return status, {part["part"]: part for part in parts}, out

    return run


def test_a_part_that_fails_does_not_stop_the_next_and_is_reported(go):
    fails = Part("first", code("print('before'); raise ValueError('this is why')"), 60)
    status, parts, out = go(fails, Part("second", code("print('done')"), 60))
    assert status == 1
    assert [part["status"] for part in parts.values()] == ["failed", "ok"]
    assert "this is why" in parts["first"]["tail"][-1] and parts["second"]["tail"] == ["done"]
    text = (out / "summary.md").read_text()
    assert "this is why" in text and "| second | ok |" in text
    assert "before" in (out / "first.log").read_text()


def test_each_part_finds_the_summary_of_those_before_it(go, tmp_path):
    reads = (
        f"import json; print(*(p['part'] for p in json.load(open({str(tmp_path / 'report/summary.json')!r}))['parts']))"
    )
    status, parts, _ = go(*(Part(name, code(reads if name != "a" else ""), 60) for name in "abc"))
    assert status == 0 and parts["b"]["tail"] == ["a"] and parts["c"]["tail"] == ["a b"]


def test_what_a_part_writes_is_listed_and_in_the_report(go, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "old.txt").write_text("")
    inside = tmp_path / "report" / "only"
    writes = f"import pathlib as p; p.Path({str(inside)!r}).mkdir(); p.Path({str(inside)!r}, 'a.csv').write_text('')"
    writes += f"; p.Path({str(elsewhere)!r}, 'new.json').write_text('')"
    _, parts, _ = go(Part("only", code(writes), 60, (elsewhere,)))
    assert {Path(path).name for path in parts["only"]["wrote"]} == {"only.log", "a.csv", "new.json"}
    assert (inside / "new.json").is_file() and not (inside / "old.txt").exists()


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_part_past_its_limit_is_asked_to_stop_then_killed_with_what_it_started(stubborn, go, monkeypatch, tmp_path):
    monkeypatch.setattr(entry, "GRACE", 2.0 if stubborn else 20.0)
    monkeypatch.setattr(entry, "LEAST", 0.1)
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)" if stubborn else "pass"
    child = f"import time, pathlib; time.sleep(20); pathlib.Path({str(tmp_path / 'survived')!r}).touch()"
    text = (
        f"import signal, subprocess, sys, time\n{ignore}\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('saved', flush=True)"
    )
    status, parts, out = go(Part("long", code(text), entry.GRACE + 6), Part("next", code(""), 60))
    assert status == 1 and parts["long"]["status"] == "stopped" and parts["next"]["status"] == "ok"
    assert ("saved" in (out / "long.log").read_text().splitlines()) != stubborn
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, timeout=60).stdout
    assert str(tmp_path / "survived") not in running


def test_a_part_for_which_no_time_is_left_is_left_out(go):
    status, parts, _ = go(Part("first", code(""), 60), minutes=0.1)
    assert status == 1 and parts["first"]["status"] == "left out"


def test_a_part_gets_no_more_than_is_left_and_knows_its_limit(monkeypatch, tmp_path):
    limits = []
    part = Part("only", lambda limit: limits.append(limit) or [sys.executable, "-c", ""], 100)
    for left in (1000, 60):
        entry.run_part(part, Run(tmp_path, 8, dry=True), {}, left)
    assert limits == [90, 50]  # less what it gets to stop


@pytest.mark.parametrize("dry", [False, True])
def test_the_parts_are_in_order_and_the_last_takes_what_is_left(dry):
    parts = parts_of(Run(Path("out"), 4.0, dry))
    assert [part.name for part in parts] == PARTS
    assert [part.seconds for part in parts][-1] is None and parts[0].seconds == 75  # half of what it has of 8 minutes


def test_a_dry_run_leaves_the_prices_of_this_machine(tmp_path):
    (prices,) = (part.command(60) for part in parts_of(Run(tmp_path, 8, dry=True)) if part.name == "prices")
    assert prices[prices.index("--out") + 1].startswith(str(tmp_path))
    (prices,) = (part.command(60) for part in parts_of(Run(tmp_path, 8)) if part.name == "prices")
    assert "--out" not in prices  # where kw reads it


@pytest.mark.parametrize("dry", [False, True])
def test_command_lines_name_options_that_exist(dry, tmp_path):
    """They stand in the scripts' sources; to ask each with --help would take half a minute."""
    scripts = Path(entry.__file__).parents[1]
    sources = "".join(path.read_text() for path in scripts.rglob("*.py"))
    for part in parts_of(Run(tmp_path, 8, dry)):
        _, flag, module, *words = part.command(60)
        assert flag == "-m"
        if module.startswith("scripts."):
            assert importlib.util.find_spec(module)
            missing = [word for word in words if word.startswith("--") and f'"{word}"' not in sources]
            assert not missing, part.name


@pytest.mark.parametrize("data", [None, Path("cifar10.tar")])
@pytest.mark.parametrize("dry", [False, True])
def test_the_training_composes(dry, data, tmp_path):
    from helpers.training import config

    (part,) = (part for part in parts_of(Run(tmp_path, 8, dry, data)) if part.name == "training")
    words = [word for word in part.command(90)[3:] if word != "-m" and not word.startswith(("n=", "hydra."))]
    made = config("n=4", *words)
    assert made.data.name == ("digits" if data is None else "cifar10")


def test_without_a_gpu_the_remedy_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        entry.parse([])
    assert "--dry" in capsys.readouterr().err


def test_a_library_that_is_too_old_stops_all_parts_with_the_remedy(monkeypatch, capsys, tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text("__version__ = '0.9'\n")  # no timm.models
    monkeypatch.setattr(entry, "install_wheels", lambda folder: tmp_path)
    monkeypatch.setattr(entry, "run_part", None)
    monkeypatch.setattr(entry, "environment_of", lambda run, wheels: {**os.environ, "PYTHONPATH": str(wheels)})
    assert entry.main(["--dry", "--out", str(tmp_path / "report")]) == 1
    said = capsys.readouterr().out
    assert "No module named 'timm.models'" in said and "make gpu-wheels" in said


def test_an_unknown_part_or_missing_data_is_refused_by_name(capsys, tmp_path):
    for words, named in (
        (["--only", "speed"], "exactness"),
        (["--data", str(tmp_path / "none")], "none does not exist"),
    ):
        with pytest.raises(SystemExit):
            entry.parse(["--dry", *words])
        assert named in capsys.readouterr().err


def test_wheels_that_do_not_install_are_reported_and_stop_nothing(monkeypatch, capsys, tmp_path):
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("not a wheel")
    monkeypatch.setattr(entry, "WHEELS", tmp_path)
    assert entry.install_wheels(tmp_path / "site") is None
    assert "were not installed" in capsys.readouterr().out
    monkeypatch.setattr(entry, "WHEELS", tmp_path / "nothing")
    assert entry.install_wheels(tmp_path / "site") is None
