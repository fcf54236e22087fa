"""Several processes against one, kills and signals: the command line, on real digits, shrunk."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from scripts import kill_storm
from scripts.kill_storm import differences, outcome
from train.jobs.checkpoint import read

ROOT = Path(__file__).parents[1]
SMALL = (
    "recipe.batch_size=64",
    "recipe.epochs=2",
    "recipe.warmup_epochs=0",
    "recipe.temperature_epochs=1",
    "data.image_size=16",
    "runtime.device=cpu",
    "backbone.kwargs.channels=[8,8,8,16]",
    "backbone.kwargs.stem_width=8",
)


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(folder, *settings, shrunk=SMALL, **more):
    command = [sys.executable, "-m", "train", *shrunk, *settings, f"hydra.run.dir={folder}"]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def run(folder, *settings, code=0, **more):
    process = start(folder, *settings, **more)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return out, errors


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process that works off each batch in two micro-batches."""
    folder = tmp_path_factory.mktemp("one")
    run(folder, "n=1/2", "runtime.micro_batch=32")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes with a micro-batch each."""
    folder = tmp_path_factory.mktemp("two")
    run(folder, "n=static", "runtime.devices=2")
    return folder


RANDOM = ("recipe.mixup=0.4", "recipe.cutmix=1.0", "recipe.drop_path=0.3", "recipe.dropout=0.2")


@pytest.mark.parametrize("micro_batch", [32, 16])
def test_two_processes_learn_as_one_does_with_the_same_micro_batches(micro_batch, tmp_path):
    """Batch statistics are those of a micro-batch, so that they are the same here and there; only the running ones,
    which evaluation uses, see the first process's half."""
    settings = ("n=static", "recipe.epochs=1", f"runtime.micro_batch={micro_batch}", *RANDOM)
    run(tmp_path / "alone", *settings)
    run(tmp_path / "together", *settings, "runtime.devices=2")
    for alone, together in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "together"), strict=True):
        assert together["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
        assert together["eval_samples"] == alone["eval_samples"] == 359


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_evaluation_counts_every_sample_once(one, ranks):
    """All 1,797 digits, which none of these numbers divides without a rest."""
    evaluate = (f"evaluate={one}", "data=digits", "data.eval_split=all", "runtime.device=cpu")
    alone = json.loads(run(one / "x", *evaluate, shrunk=())[0])
    shared = json.loads(run(one / "y", *evaluate, f"runtime.devices={ranks}", shrunk=())[0])
    assert shared["eval_samples"] == alone["eval_samples"] == 1797
    assert (shared["top1"], shared["top5"]) == (alone["top1"], alone["top5"])
    assert shared["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("devices, number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGUSR1)])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_end(devices, number, two, tmp_path):
    settings = ("n=static", f"runtime.devices={devices}")
    if devices == 1:
        run(tmp_path / "calm", *settings)
    calm = two if devices == 2 else tmp_path / "calm"
    stopped = tmp_path / "stopped"
    more = ("runtime.checkpoint_steps=5", "runtime.workers=1")  # a terminal signals those too
    process = start(stopped, *settings, *more, start_new_session=True)
    while process.poll() is None and not (stopped / "checkpoints" / "last.pt").exists():
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does at Ctrl-C
    else:
        process.send_signal(number)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "Stopped by a signal" in out
    assert read(stopped / "checkpoints" / "last.pt")["step"] < 44
    out, _ = run(stopped, *settings)
    assert "Resumed" in out
    assert differences(outcome(calm), outcome(stopped)) == []


JOB = """
import math
import signal
import sys
from pathlib import Path
import torch
from hydra import compose, initialize_config_dir
from train.config import validate
from train.jobs.errors import NonFiniteError
from train.jobs.world import connect, disconnect
from train.trainer import Trainer

with initialize_config_dir(sys.argv[1], version_base="1.3"):
    config = validate(compose("train", sys.argv[3:]))
world = connect(config.runtime)
trainer = Trainer(config, Path(sys.argv[2]), world)
Path(sys.argv[2]).mkdir(exist_ok=True)
{disturb}
try:
    trainer.fit()
    print(f"process {{world.rank}} finished", flush=True)
except SystemExit as left:
    print(f"process {{world.rank}} left with {{left.code}} after step {{trainer.step}}", flush=True)
except NonFiniteError as error:
    print(f"process {{world.rank}} raised {{error}}", flush=True)
disconnect()
"""


def job(folder, disturb, *settings):
    """What two processes print, each of which disturbs its trainer."""
    (folder / "job.py").write_text(JOB.format(disturb=disturb))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(folder / "job.py"), str(ROOT / "configs"), str(folder / "run"), *SMALL, "n=static", *settings]
    done = subprocess.run([*command, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    out = job(tmp_path, STOPPED_IN_AN_EVALUATION)
    assert all(f"process {rank} left with 143 after step 22" in out for rank in range(2))
    state = read(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["step"] == 22 and state["unevaluated"] > 0
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run(tmp_path / "run", "n=static", "runtime.devices=2")
    assert differences(outcome(two), outcome(tmp_path / "run")) == []


IN_A_STEP = """
loss_of = trainer.learner.loss
def disturbed(logits, targets):
    loss = loss_of(logits, targets)
    if trainer.step == {step} and world.rank == 1:
        {what}
    return loss
trainer.learner.loss = disturbed
"""


@pytest.mark.parametrize("step, every, left_after", [
    (7, "null", 9),  # the step that was asked is done, and the next one
    (21, "null", 22),  # unless a checkpoint comes first, as at an epoch's end
])  # fmt: skip
def test_a_signal_to_one_process_stops_all_after_the_same_step(step, every, left_after, two, tmp_path):
    disturb = IN_A_STEP.format(step=step, what="signal.raise_signal(signal.SIGUSR1)")
    out = job(tmp_path, disturb, f"runtime.checkpoint_steps={every}")
    assert all(f"process {rank} left with {128 + signal.SIGUSR1} after step {left_after}" in out for rank in range(2))
    assert read(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == left_after
    run(tmp_path / "run", "n=static", "runtime.devices=2")
    assert differences(outcome(two), outcome(tmp_path / "run")) == []


@pytest.mark.parametrize("step, every, saved", [(8, 5, 5), (7, 4, 4)])
def test_a_broken_loss_of_one_process_stops_all_at_the_same_step_and_is_not_saved(step, every, saved, two, tmp_path):
    disturb = IN_A_STEP.format(step=step, what="loss = loss * math.nan")
    out = job(tmp_path, disturb, f"runtime.checkpoint_steps={every}")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    # Two processes write to one stream: a line may begin behind what the other one wrote.
    told = re.findall(r"process \d raised .*?was kept: .*?last\.pt\.", out)
    assert sorted(line[:22] for line in told) == ["process 0 raised Step ", "process 1 raised Step "]
    assert all(f"Step {step}: loss " in line and line.endswith(f"was kept: {last}.") for line in told)
    assert len({line.partition("Indices")[2] for line in told}) == 1  # the second one's samples
    assert read(last)["step"] == saved
    run(tmp_path / "run", "n=static", "runtime.devices=2")
    assert differences(outcome(two), outcome(tmp_path / "run")) == []


EACH_HAS_ITS_OWN = """
def mean(model):
    return next(value for name, value in model.named_buffers() if name.endswith("running_mean"))
def saved():
    state = torch.load(trainer.checkpoints.folder / "last.pt")["model"]
    return next(value for name, value in state.items() if name.endswith("running_mean"))
own = []
def after_a_step(trainer):
    assert len(trainer.world.stack(mean(trainer.model)).unique(dim=0)) == 2, "still shared in each step"
    own[:] = [mean(trainer.model).clone()]
    if world.is_main and trainer.step == trainer.steps:
        assert torch.equal(saved(), own[0]), "not the first one's"
def after_the_evaluation(trainer):
    for model in (trainer.model, trainer.ema.module):
        assert len(trainer.world.stack(mean(model)).unique(dim=0)) == 1, "not shared"
    if world.is_main:
        assert torch.equal(mean(trainer.model), own[0]) and torch.equal(saved(), own[0])
trainer.on_step.append(after_a_step)
trainer.on_epoch_end.append(after_the_evaluation)
"""


def test_running_statistics_are_each_processs_own_until_the_first_ones_are_evaluated_and_saved(tmp_path):
    out = job(tmp_path, EACH_HAS_ITS_OWN, "recipe.ema_decay=0.9", "recipe.epochs=1")
    assert out.count("finished") == 2


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(two, tmp_path):
    stopped = tmp_path / "run"
    process = start(stopped, "n=static", "runtime.checkpoint_steps=5", "runtime.devices=2")
    while process.poll() is None and not (stopped / "checkpoints" / "last.pt").exists():
        time.sleep(0.02)
    process.kill()
    process.communicate()
    out, _ = run(stopped, "n=static", "runtime.micro_batch=32")
    assert "Resuming with 1 processes; there were 2" in out
    for now, undisturbed in zip(metrics(stopped), metrics(two), strict=True):
        assert now["train_loss"] == pytest.approx(undisturbed["train_loss"], rel=1e-3)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_short_kill_storm(devices):
    command = [sys.executable, "-m", "scripts.kill_storm", "--kills", "2", "--devices", str(devices)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Killed 2 times" in done.stdout, done.stdout + done.stderr
    assert "The same to the bit" in done.stdout


def test_a_storm_goes_on_until_it_has_killed_as_often_as_asked(tmp_path, monkeypatch, capsys):
    """Also where runs end by themselves before, the first without a kill."""
    storms, spans = [], []

    def storm(folder, settings, kills, span, chance):
        storms.append((folder.name, kills))
        spans.append(span)
        return min(1, len(storms) - 1)

    monkeypatch.setattr(kill_storm, "storm", storm)
    monkeypatch.setattr(kill_storm, "start", lambda *_: subprocess.Popen(["true"], stderr=subprocess.PIPE))
    monkeypatch.setattr(kill_storm, "outcome", lambda folder: {"step": 5})
    monkeypatch.setattr(sys, "argv", ["kill_storm", "--kills", "3"])
    with pytest.raises(SystemExit) as left:
        kill_storm.main()
    assert not left.value.code
    assert storms == [("stormy0", 3), ("stormy1", 3), ("stormy2", 2), ("stormy3", 1)]
    assert spans[0] > spans[1] == spans[2] == spans[3]
    assert "Killed 3 times, in 4 runs. The same to the bit." in capsys.readouterr().out


def test_two_agents_on_one_machine_stand_for_two_nodes(two, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = ("n=static", "label=nodes", "runtime.nodes=2", f"runtime.rendezvous=localhost:{port}")
    agents = [start(tmp_path, *settings) for _ in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=300)
        assert agent.returncode == 0, errors
    for nodes, processes in zip(metrics(tmp_path), metrics(two), strict=True):
        assert nodes["train_loss"] == pytest.approx(processes["train_loss"], rel=1e-6)


def test_torchrun_around_it_works_too(two, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train"]
    done = subprocess.run(
        [*command, *SMALL, "n=static", f"hydra.run.dir={tmp_path}"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line["train_loss"] for line in metrics(tmp_path)] == [line["train_loss"] for line in metrics(two)]
    assert json.loads((tmp_path / "summary.json").read_text())["devices"] == 2
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["runtime"]["devices"] == 2


@pytest.mark.parametrize("devices", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(devices, tmp_path):
    settings = ("n=static", f"runtime.devices={devices}", "recipe.optimizer=sgd", "recipe.schedule=constant")
    _, errors = run(tmp_path, *settings, "recipe.lr=1e30", code=1)
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
    out, _ = run(tmp_path, "n=1", "recipe.ema_decay=0.99", "recipe.epochs=1", "recipe.temperature_epochs=2")
    assert out.count("the temperature ends at 0.50, not at 0") == 1
    state = read(tmp_path / "checkpoints" / "last.pt")
    key = next(key for key in state["model"] if key.endswith("temperature"))
    assert torch.equal(state["model"][key], state["ema"][key])
    assert 0 < state["ema"][key] < 1
