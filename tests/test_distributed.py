"""Several processes against one, kills and signals: the command line, on real digits, shrunk."""

import json
import os
import re
import signal
import socket
import sys
import time

import pytest
import torch
import yaml
from helpers.programs import ROOT, Program, command, finish, ranks, wait_for

from scripts.kill_storm import differences, outcome
from train.jobs.launch import PassedOn
from train.jobs.reading import read

SMALL = (
    "recipe.batch_size=32",
    "data.train_images=704",
    "recipe.epochs=2",
    "recipe.warmup_epochs=0",
    "recipe.temperature_epochs=1",
    "data.image_size=16",
    "runtime.device=cpu",
    "backbone.kwargs.channels=[8,8,8,16]",
    "backbone.kwargs.stem_width=8",
)
STEPS = 44  # of such a run


def run(folder, *settings, shrunk=SMALL, code=0):
    """Train in one process."""
    return finish(Program("train", *shrunk, *settings, f"hydra.run.dir={folder}"), code)


def run_both(folder, *settings, count=2, shrunk=SMALL, code=0):
    """Train in processes that find each other as those of torchrun do."""
    return [finish(each, code) for each in ranks(count, "train", *shrunk, *settings, f"hydra.run.dir={folder}")]


def disturb(folder, code, *settings):
    """What two processes print that run `code` with their trainer first (helpers/disturbed.py)."""
    (folder / "code.py").write_text(code)
    processes = ranks(2, "helpers.disturbed", folder / "code.py", folder / "run", *SMALL, "n=static", *settings)
    return "".join(finish(each, code=None).stdout for each in processes)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a short run of one process."""
    folder = tmp_path_factory.mktemp("one")
    run(folder, "n=1/2", "recipe.epochs=1", "data.train_images=64")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two processes with a micro-batch each."""
    folder = tmp_path_factory.mktemp("two")
    run_both(folder, "n=static")
    return folder


RANDOM = ("recipe.mixup=0.4", "recipe.cutmix=1.0", "recipe.drop_path=0.3", "recipe.dropout=0.2")


@pytest.mark.parametrize("micro_batch", [pytest.param(32, marks=pytest.mark.slow), 16])
def test_two_processes_learn_as_one_does_with_the_same_micro_batches(micro_batch, tmp_path):
    """Batch statistics are those of a micro-batch, so that they are the same here and there; only the running ones,
    which evaluation uses, see the first process's half."""
    settings = ("n=static", "recipe.epochs=1", "recipe.batch_size=64", f"runtime.micro_batch={micro_batch}", *RANDOM)
    run(tmp_path / "alone", *settings)
    run_both(tmp_path / "together", *settings)
    for alone, together in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "together"), strict=True):
        assert together["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
        assert together["eval_samples"] == alone["eval_samples"] == 359


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_evaluation_counts_every_sample_once(one, count):
    """All 1,797 digits, which none of these numbers divides without remainder."""
    evaluate = (f"evaluate={one}", "data=digits", "data.eval_split=all", "runtime.device=cpu")
    alone = json.loads(run(one / "x", *evaluate, shrunk=()).stdout)
    shared = json.loads(run_both(one / "y", *evaluate, count=count, shrunk=())[0].stdout)
    assert shared["eval_samples"] == alone["eval_samples"] == 1797
    assert (shared["top1"], shared["top5"]) == (alone["top1"], alone["top5"])
    assert shared["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)


WAITS_AT_STEP_7 = """
at(trainer, 7, lambda: until_signalled(trainer, f"{trainer.folder}/waits{world.rank}"))
"""


@pytest.mark.parametrize("devices, number", [
    pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow), (1, signal.SIGINT), (2, signal.SIGUSR1),
    pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_signal_saves_and_the_same_command_resumes_to_the_same_end(devices, number, two, tmp_path):
    """The signal goes to the launcher, which passes it on; Ctrl-C to all processes, those that load data too."""
    folder, code = tmp_path / "stopped", tmp_path / "code.py"
    code.write_text(WAITS_AT_STEP_7)
    settings = (*SMALL, "n=static", f"runtime.devices={devices}", "runtime.workers=1")
    process = Program("helpers.disturbed", code, folder, *settings, start_new_session=True)
    for rank in range(devices):
        wait_for(folder / f"waits{rank}", process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    stopped = finish(process, code=128 + number)
    assert "Stopped by a signal" in stopped.stdout
    assert 7 <= read(folder / "checkpoints" / "last.pt")["step"] < 10
    if devices == 1:
        run(tmp_path / "calm", "n=static")
        resumed = run(folder, "n=static")
    else:
        resumed, _ = run_both(folder, "n=static")
    assert "Resumed" in resumed.stdout
    assert differences(outcome(two if devices == 2 else tmp_path / "calm"), outcome(folder)) == []


def interrupted(folder, seconds):
    """Workers that need so many seconds to save, after a Ctrl-C, which all of them and their launcher get."""
    process = Program("helpers.slow_to_leave", folder, seconds, start_new_session=True)
    for rank in range(2):
        wait_for(folder / f"waits{rank}", process)
    os.killpg(process.pid, signal.SIGINT)
    return process


@pytest.mark.slow
def test_after_a_ctrl_c_workers_have_the_time_that_they_need_to_save(tmp_path):
    """torch's launcher gives them 30 seconds."""
    finish(interrupted(tmp_path, 35), code=128 + signal.SIGINT)
    assert {"saved0", "saved1"} <= {path.name for path in tmp_path.iterdir()}


def test_a_second_ctrl_c_ends_workers_that_do_not_leave(tmp_path):
    process = interrupted(tmp_path, 1000)
    while process.poll() is None:  # one may fall together with the first
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    finish(process, code=128 + signal.SIGINT)


def test_a_signal_before_there_are_workers_goes_to_who_had_it_before(monkeypatch):
    """As submitit's handler of a time limit, which puts the job back into the queue."""
    came = []
    monkeypatch.setattr("multiprocessing.active_children", list)
    before = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    try:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGUSR1)), PassedOn():
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [signal.SIGUSR1]


STOPPED_IN_AN_EVALUATION = """
images = trainer.data.eval_samples.images
load = images.load
def asked(index):
    if index == 43:  # the second process has the odd ones
        signal.raise_signal(signal.SIGTERM)
    return load(index)
images.load = asked
"""


def test_a_signal_to_one_process_in_an_evaluation_stops_all_and_loses_nothing(two, tmp_path):
    out = disturb(tmp_path, STOPPED_IN_AN_EVALUATION)
    assert all(f"process {rank} left with 143 after step 22" in out for rank in range(2))
    state = read(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["step"] == 22 and state["unevaluated"] > 0
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run_both(tmp_path / "run", "n=static")
    assert differences(outcome(two), outcome(tmp_path / "run")) == []


SIGNALLED = """
if world.rank == 1:
    in_loss(trainer, STEP, lambda loss: (signal.raise_signal(signal.SIGUSR1), loss)[1])
"""


@pytest.mark.parametrize("step, every, left_after", [
    (7, "null", 9),  # the step that was asked is done, and the next one
    pytest.param(21, "null", 22, marks=pytest.mark.slow),  # unless a checkpoint comes first, as at an epoch's end
])  # fmt: skip
def test_a_signal_to_one_process_stops_all_after_the_same_step(step, every, left_after, two, tmp_path):
    out = disturb(tmp_path, SIGNALLED.replace("STEP", str(step)), f"runtime.checkpoint_steps={every}")
    assert all(f"process {rank} left with {128 + signal.SIGUSR1} after step {left_after}" in out for rank in range(2))
    assert read(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == left_after
    run_both(tmp_path / "run", "n=static")
    assert differences(outcome(two), outcome(tmp_path / "run")) == []


BROKEN = """
if world.rank == 1:
    in_loss(trainer, STEP, lambda loss: loss * math.nan)
"""


@pytest.mark.parametrize("step, every, saved", [(8, 5, 5), pytest.param(7, 4, 4, marks=pytest.mark.slow)])
def test_a_broken_loss_of_one_process_stops_all_at_the_same_step_and_is_not_saved(step, every, saved, two, tmp_path):
    out = disturb(tmp_path, BROKEN.replace("STEP", str(step)), f"runtime.checkpoint_steps={every}")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    raised = re.findall(r"process \d raised .*?last\.pt\.", out)
    assert sorted(line[:22] for line in raised) == ["process 0 raised Step ", "process 1 raised Step "]
    assert all(f"Step {step}: loss " in line and line.endswith(f"{last}.") for line in raised)
    assert len({line.partition("Indices")[2] for line in raised}) == 1  # the second one's samples
    assert read(last)["step"] == saved
    run_both(tmp_path / "run", "n=static")
    assert differences(outcome(two), outcome(tmp_path / "run")) == []


EACH_HAS_ITS_OWN = """
def mean(model):
    return next(value for name, value in model.named_buffers() if name.endswith("running_mean"))
evaluate, save = trainer.evaluate, trainer.save
def saving():
    save()
    assert len(trainer.world.stack(mean(trainer.model)).unique(dim=0)) == 2, "still shared in each step"
    trainer.saved = mean(trainer.model).clone()
def evaluating(model):
    found = evaluate(model)
    assert len(trainer.world.stack(mean(model)).unique(dim=0)) == 1, "not shared"
    if world.is_main:
        state = torch.load(trainer.checkpoints.folder / "last.pt")["model"]
        kept = next(value for name, value in state.items() if name.endswith("running_mean"))
        assert torch.equal(kept, trainer.saved) and torch.equal(mean(trainer.model), kept)
    return found
trainer.save, trainer.evaluate = saving, evaluating
"""


def test_running_statistics_are_each_processs_own_until_the_first_ones_are_evaluated_and_saved(tmp_path):
    out = disturb(tmp_path, EACH_HAS_ITS_OWN, "recipe.ema_decay=0.9", "recipe.epochs=1")
    assert out.count("finished") == 2


KILLED_AT_STEP_6 = """
at(trainer, 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_run_resumes_to_the_same_end(two, tmp_path):
    disturb(tmp_path, KILLED_AT_STEP_6, "runtime.checkpoint_steps=5")
    assert read(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 5
    run_both(tmp_path / "run", "n=static")
    assert differences(outcome(two), outcome(tmp_path / "run")) == []


def test_a_run_resumes_with_another_number_of_processes_and_says_so(two, tmp_path):
    disturb(tmp_path, KILLED_AT_STEP_6, "runtime.checkpoint_steps=5")
    done = run(tmp_path / "run", "n=static", "runtime.micro_batch=16")
    assert "Resuming with 1 processes; there were 2" in done.stdout
    for now, undisturbed in zip(metrics(tmp_path / "run"), metrics(two), strict=True):
        assert now["train_loss"] == pytest.approx(undisturbed["train_loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("devices", [1, 2])
def test_a_short_kill_storm(devices):
    words = ("-m", "scripts.kill_storm", "--kills", 2, "--devices", devices)
    done = command(sys.executable, *words, cwd=ROOT, timeout=850)
    assert "Killed 2 times" in done.stdout and "The same to the bit" in done.stdout


@pytest.mark.slow
def test_two_launchers_on_one_machine_stand_for_two_nodes(two, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = ("n=static", "label=nodes", "runtime.nodes=2", f"runtime.rendezvous=localhost:{port}")
    for launcher in [Program("train", *SMALL, *settings, f"hydra.run.dir={tmp_path}") for _ in range(2)]:
        finish(launcher)
    for nodes, processes in zip(metrics(tmp_path), metrics(two), strict=True):
        assert nodes["train_loss"] == pytest.approx(processes["train_loss"], rel=1e-6)


@pytest.mark.slow
def test_torchrun_around_it_works_too(two, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "train")
    command(sys.executable, *torchrun, *SMALL, "n=static", f"hydra.run.dir={tmp_path}")
    assert [line["train_loss"] for line in metrics(tmp_path)] == [line["train_loss"] for line in metrics(two)]
    assert json.loads((tmp_path / "summary.json").read_text())["devices"] == 2
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["runtime"]["devices"] == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    settings = ("n=static", "recipe.optimizer=sgd", "recipe.schedule=constant", "recipe.lr=1e30")
    errors = "".join(done.stderr for done in run_both(tmp_path, *settings, code=1))
    assert errors.count("NonFiniteError: Step ") == 1 and "Indices of its samples" in errors
    assert "Traceback" not in errors


def test_a_second_job_is_kept_out_of_the_folder(tmp_path, monkeypatch):
    from train.jobs import folder
    from train.jobs.errors import ConfigError

    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.2)
    with folder.lock(tmp_path), pytest.raises(ConfigError, match="Another job"):
        folder.lock(tmp_path)
    folder.lock(tmp_path).close()


def test_slurm_gets_the_job_back(tmp_path, monkeypatch):
    from train.jobs.signals import requeue

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not requeue()
    fake = tmp_path / "scontrol"
    fake.write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert requeue() and (tmp_path / "asked").read_text() == "requeue 42\n"


def test_an_average_is_evaluated_at_the_models_temperature(tmp_path):
    out = run(tmp_path, "n=1", "recipe.ema_decay=0.99", "recipe.epochs=1", "recipe.temperature_epochs=2").stdout
    assert out.count("the temperature ends at 0.50, not at 0") == 1
    state = read(tmp_path / "checkpoints" / "last.pt")
    key = next(key for key in state["model"] if key.endswith("temperature"))
    assert torch.equal(state["model"][key], state["ema"][key])
    assert 0 < state["ema"][key] < 1
