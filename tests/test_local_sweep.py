"""Sweeps on this machine, several jobs at once: each job's share of GPUs or cores, and the states that are shown."""

import json
import os
import threading
from contextlib import ExitStack
from io import StringIO

import pytest
from rich.console import Console

from train.jobs import outcomes, slots, states
from train.jobs.errors import ConfigError


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """No other sweep is on it."""
    monkeypatch.setattr(slots.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(slots, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(slots.torch, "set_num_threads", lambda count: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    slots.offer_gpus()
    yield
    os.environ.pop(slots.GPUS)


def test_each_job_has_gpus_of_its_own():
    with slots.share("auto", 1, 0) as one, slots.share("cuda", 1, 0) as other:
        assert (one, other) == ("gpu 3", "gpu GPU-5")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-5"  # of the job that came last


@pytest.mark.parametrize("devices", [1, 2])
def test_a_job_waits_until_enough_are_free(devices):
    taken, began = [], threading.Event()

    def job():
        began.set()
        with slots.share("auto", devices, 0) as mine:
            taken.append(mine)

    with ExitStack() as first, slots.share("auto", 1, 0):
        first.enter_context(slots.share("auto", 1, 0))
        waiting = threading.Thread(target=job)
        waiting.start()
        began.wait()
        assert not taken
        if devices == 1:
            first.close()
            waiting.join(10)
            assert taken == ["gpu GPU-5"]
    waiting.join(10)
    assert taken == ["gpu GPU-5" if devices == 1 else "gpu 3, GPU-5"]


def test_more_gpus_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match=r"runtime\.devices=3: this machine has 2 GPUs"), slots.share("auto", 3, 0):
        pass


def test_on_a_cpu_a_job_takes_cores_for_its_processes(monkeypatch):
    monkeypatch.setattr(slots.os, "sched_getaffinity", lambda _: {0, 1, 4, 5})
    with slots.share("cpu", 1, 1) as mine, slots.share("cpu", 1, 0) as other:
        assert (mine, other) == ("cores 0, 1", "cores 4")
    with slots.share("cpu", 8, 3) as all_of_them:
        assert all_of_them == "cores 0, 1, 4, 5"


def test_states_are_told_once_each_and_last_epochs_are_in_the_table(tmp_path):
    sweep = outcomes.begin(tmp_path / "runs")
    outcomes.note(sweep, 0, "n=1", "runs on core 0")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 3, "loss": 1, "top1": 71.5}) + "\n")
    outcomes.tell_folder(sweep, 0, tmp_path)
    out = StringIO()
    watch = states.Watch(sweep, Console(file=out, width=200))
    outcomes.note(sweep, 1, "n=3/7", "ConfigError: n")
    watch.stop()
    watch._tell()
    assert sorted(out.getvalue().splitlines()) == ["job 0  n=1: runs on core 0", "job 1  n=3/7: ConfigError: n"]
    Console(file=out, width=200).print(states.table(states.states_in(sweep)))
    assert "epoch 3, top1 71.5" in out.getvalue()
    outcomes.forget()
