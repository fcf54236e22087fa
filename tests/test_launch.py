"""What a command does around its jobs: run folders made and removed, names, sweeps, and errors in one line."""

import contextlib
import fcntl
import sys
import threading
import time

import pytest
from helpers.training import NARROW, TINY, config
from PIL import Image
from torch import nn

import train.__main__ as entry
from train.jobs import folder as run_folder
from train.jobs.command import Jobs
from train.jobs.errors import ConfigError, LaunchError
from train.model import build_model
from train.optim import build_optimizer
from train.run import start


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory of its own, and a command that has not begun."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(entry, "jobs", Jobs())
    return work


@pytest.fixture
def command(monkeypatch, capsys):
    """`python -m train` in this process: what it prints on stderr, and the errors of its jobs."""

    def run(*words, left=False):
        monkeypatch.setattr(sys, "argv", ["train", *words])
        with contextlib.nullcontext() if left else contextlib.suppress(SystemExit):
            entry.jobs.run(entry.main, "train")
        return capsys.readouterr().err, entry.jobs.failed

    return run


def trained(monkeypatch):
    """Jobs that get as far as their start only leave a file; their folders."""
    names = []

    def leave_a_file(config, folder, typed):
        names.append(folder)
        (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(entry, "start", leave_a_file)
    return names


def test_a_failed_command_leaves_the_folders_that_were_there(here, command):
    _, failed = command("data=imagenet", "data.root=/nope", f"hydra.run.dir={here}")
    assert len(failed) == 1 and list(here.iterdir()) == []
    (here / "kept").mkdir()
    command("data=imagenet", "data.root=/nope", "hydra.run.dir=kept/a/b")
    assert list(here.rglob("*")) == [here / "kept"]
    command("n=3/2")
    assert list(here.rglob("*")) == [here / "kept"]


def test_a_failed_start_leaves_no_lock(here, command):
    command("data=imagenet", "data.root=/nope")
    assert list(here.iterdir()) == []
    (here / "kept").mkdir()
    (here / "kept" / "note").touch()
    command("data=imagenet", "data.root=/nope", "hydra.run.dir=kept")
    assert (here / "kept" / "note").exists()  # beside a lock: the folder is in use


def test_who_waits_for_a_lock_that_is_removed_gets_one_that_others_see(here, monkeypatch):
    """Held by one, awaited by another: the first takes the file away, and a third must not get in beside the second."""
    first = run_folder.lock(here)
    got = []
    waiting = threading.Thread(target=lambda: got.append(run_folder.lock(here)))
    waiting.start()
    time.sleep(0.3)
    (here / run_folder.LOCK).unlink()
    first.close()
    waiting.join()
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.2)
    with got[0], pytest.raises(ConfigError, match="Another job"):
        run_folder.lock(here)


def test_a_lock_on_a_file_that_was_removed_is_none(here):
    file = (here / run_folder.LOCK).open("w")
    (here / run_folder.LOCK).unlink()
    assert not run_folder._claim(file, here / run_folder.LOCK)
    file.close()


def test_the_lock_of_a_job_at_work_stays(here):
    with run_folder.lock(here):
        run_folder.remove_lock(here)
        assert (here / run_folder.LOCK).exists()
    with (here / run_folder.LOCK).open() as file:  # and is free after it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    run_folder.remove_lock(here)
    assert list(here.iterdir()) == []


def test_a_run_folder_that_cannot_be_made_is_reported(here, command):
    (here / "runs").touch()  # in the way
    said, failed = command()
    assert said.startswith(f"ConfigError: The run folder {here}/runs/digits/resnet_digits_kw1x/seed0 cannot be made: ")
    assert said.count("\n") == 1 and len(failed) == 1
    for place in (["hydra.run.dir=/proc/x"], ["-m", "n=1", "hydra.sweep.dir=/proc/x"], ["-m", "n=1"]):
        with pytest.raises(SystemExit, match=r"^ConfigError: The run folder .* cannot be made: .*[.]$"):
            command(*place, left=True)
    assert list(here.iterdir()) == [here / "runs"]


def test_a_folder_of_a_sweep_that_cannot_be_made_does_not_stop_the_others(here, command, monkeypatch):
    names = trained(monkeypatch)
    (here / "runs" / "digits").mkdir(parents=True)
    (here / "runs" / "digits" / "a").touch()  # in the way
    said, _ = command("-m", "name=a,b")
    assert [path.parent.name for path in names] == ["b"]
    assert "1 of 2 jobs failed:\n  name=a: ConfigError: The run folder" in said


def test_jobs_of_a_sweep_do_not_share_a_run_folder(command, monkeypatch):
    names = trained(monkeypatch)
    said, failed = command("-m", "runtime.micro_batch=32,64")
    assert len(names) == 1 and len(failed) == 1 and "runtime.micro_batch=64" in failed[0]
    assert said.count("Another job of this sweep has the run folder") == 2  # at once, and at the end
    monkeypatch.setattr(entry, "jobs", Jobs())
    _, failed = command("-m", "runtime.micro_batch=32,64", "label=x${runtime.micro_batch}")
    assert not failed and names[1:] == [names[1].parents[1] / f"x{size}_kw1x" / "seed0" for size in (32, 64)]


def test_evaluations_of_a_sweep_need_no_folder_each(command, monkeypatch):
    monkeypatch.setattr(entry, "start", lambda config, folder, typed: None)
    _, failed = command("-m", "evaluate=a,b")
    assert entry.jobs.count == 2 and not failed


def test_a_sweep_says_which_jobs_failed(command, monkeypatch):
    trained(monkeypatch)
    said, failed = command("-m", "n=1,3/2,static,-1", "label=x")
    assert len(failed) == 2
    summary = said[said.index("2 of 4 jobs failed:") :].splitlines()
    assert summary[1].startswith("  n=3/2 label=x: ConfigError: n='3/2'")
    assert summary[2].startswith("  n=-1 label=x: ConfigError: n=-1")
    monkeypatch.setattr(entry, "jobs", Jobs())
    said, _ = command("n=3/2")
    assert "jobs failed" not in said  # it is said already


def test_a_run_of_the_command_trains(here, command):
    _, failed = command(*TINY, *NARROW, "n=static", "runtime.device=cpu")
    assert not failed and len(list(here.rglob("summary.json"))) == 1


def test_a_batch_that_cannot_be_shared_out_is_reported_before_workers_start(here, monkeypatch):
    monkeypatch.setattr("train.run.launch", None)
    with pytest.raises(ConfigError, match=r"recipe\.batch_size=127"):
        start(config("recipe.batch_size=127", "runtime.devices=2"), here)


@pytest.mark.slow
def test_a_broken_image_is_not_buried_by_the_other_processes(here, capfd):
    """The error, a line of the process that lost contact, if it was still there, and nothing of torch's."""
    for split in ("train", "val"):
        for name in "ab":
            (here / split / name).mkdir(parents=True)
            for k in range(8):
                Image.new("RGB", (20, 20), (k * 30, 0, 0)).save(here / split / name / f"{k}.png")
    (here / "train" / "a" / "3.png").write_bytes(b"no image")
    data = ("data=folder", f"data.root={here}", "data.image_size=16", "recipe=digits", "recipe.batch_size=8")
    small = ("recipe.epochs=1", "recipe.warmup_epochs=0", *NARROW, "n=static", "runtime.device=cpu")
    with pytest.raises(LaunchError):
        start(config(*data, *small, "runtime.devices=2"), here / "run")
    lines = capfd.readouterr().err.splitlines()
    assert sum("3.png cannot be read as an image" in line for line in lines) == 1
    assert all(line.startswith("DataError: ") or "lost contact" in line for line in lines), lines


@pytest.mark.parametrize("name", ["adan", "bnbsgd8bit", "fusedlamb"])
def test_an_optimizer_that_cannot_be_built_here_is_named(name):
    with pytest.raises(ConfigError, match=rf"recipe\.optimizer='{name}'"):
        build_optimizer(nn.Linear(3, 3), config(f"recipe.optimizer={name}").recipe)


def test_any_timm_model_is_composed_and_built():
    made = config("backbone=timm", "backbone.name=regnety_002", "n=1/2")
    assert made.name == "regnety_002_kw1d2x" and made.backbone.kwargs == {}
    assert type(build_model(made, 10)).__name__ == "RegNet"
    with pytest.raises(ConfigError, match=r"backbone\.name"):
        config("backbone=timm")
    with pytest.raises(ConfigError, match="backbone=timm has none"):
        build_model(config("backbone.name=regnety_002"), 10)
