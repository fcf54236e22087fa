"""Watching a run: TensorBoard, wandb and the profiler; and jobs elsewhere: submitit here, SLURM with fake commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import wandb_files
from helpers.programs import ROOT, environment
from helpers.training import NARROW, TINY, config, launch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.kill_storm import case_of
from scripts.report.runs import find_runs
from train.config import learnt_settings
from train.jobs.errors import ConfigError
from train.jobs.launch import meeting_point
from train.jobs.metrics import MetricsFile
from train.jobs.slurm import first_host, rendezvous
from train.jobs.weights_and_biases import import_wandb
from train.jobs.world import World
from train.services import Services
from train.trainer import Trainer

SMALL = (*TINY, *NARROW, "n=static", "recipe.epochs=3")


class Stop(Exception):
    pass


def train(folder, *overrides, stop_after=None):
    """Train in this process, up to an epoch's end; like a kill there, the next call goes on from its checkpoint."""
    folder.mkdir(exist_ok=True)
    trainer = Trainer(config(*SMALL, *overrides), folder, World(0, 1, torch.device("cpu")))
    trainer.resume()

    def stop(trainer):
        if trainer.step == stop_after:
            raise Stop

    trainer.on_epoch_end.append(stop)
    return trainer.fit()


def curves(folder):
    """{key: [(step, value), ...]} as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_curves_are_the_metrics(folder):
    lines = MetricsFile(folder / "metrics.jsonl").read()
    shown = curves(folder)
    assert shown.keys() == lines[0].keys() - {"step", "device"}  # which are not figures
    for key, points in shown.items():
        assert [step for step, _ in points] == [line["step"] for line in lines], key
        assert [value for _, value in points] == pytest.approx([line[key] for line in lines], rel=1e-6), key


def test_tensorboard_goes_on_after_a_resume_without_doubled_points(tmp_path):
    with pytest.raises(Stop):
        train(tmp_path, "logger=tensorboard", stop_after=10)
    assert_curves_are_the_metrics(tmp_path)
    trainer = Trainer(config(*SMALL, "logger=tensorboard"), tmp_path, World(0, 1, torch.device("cpu")))
    trainer.services.start(trainer.config, tmp_path)  # an epoch that was shown, but whose checkpoint was lost
    trainer.services.log({"step": 15, "epoch": 2, "train_loss": 99.0, "top1": 99.0})
    trainer.services.finish(None)
    train(tmp_path, "logger=tensorboard")
    assert_curves_are_the_metrics(tmp_path)


def test_tensorboard_turned_on_late_shows_the_whole_run(tmp_path):
    with pytest.raises(Stop):
        train(tmp_path, stop_after=10)
    assert not (tmp_path / "tensorboard").exists() and not (tmp_path / "profile").exists()
    train(tmp_path, "logger=tensorboard")
    assert_curves_are_the_metrics(tmp_path)


def wandb_run(folder):
    """A run folder's wandb runs, and what they hold of top1: ({id}, {group}, {step: top1})."""
    ids, groups, history = set(), set(), {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_files.whole_run(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                groups.add(record.run.run_group)
            if record.HasField("history"):
                values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                history[int(values["_step"])] = float(values["top1"])
    return ids, groups, history


def test_a_resumed_run_is_one_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # offline, so that nobody is there does not matter
    with pytest.raises(Stop):
        train(tmp_path, "logger=wandb", stop_after=10)
    train(tmp_path, "logger=wandb")
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    ids, _, history = wandb_run(tmp_path)
    assert ids == {(tmp_path / "wandb" / "id").read_text()}
    assert history == {line["step"]: line["top1"] for line in MetricsFile(tmp_path / "metrics.jsonl").read()}


def test_wandb_online_without_a_login_or_a_package_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    services = Services(["wandb"], main=True)
    with pytest.raises(ConfigError, match=r"logger\.mode=online.*wandb login"):
        services.start(config("logger=wandb", "logger.mode=online"), tmp_path)
    services.finish(None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb cannot be imported"):
        services.start(config("logger=wandb"), tmp_path)


def test_wandb_with_a_login_is_found_without_a_warning(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    import_wandb("online")
    assert "deprecated" not in "".join(capfd.readouterr())


def test_only_the_main_process_has_services():
    assert Services(["tensorboard", "wandb"], main=False).services == []


def test_the_logger_is_checked_and_decides_nothing_that_is_learnt():
    assert config().logger.services == []
    assert config("logger=both").logger.services == ["tensorboard", "wandb"]
    assert learnt_settings(config("logger=both")) == learnt_settings(config())
    for override, key in (("logger.services=[visdom]", "services"), ("logger.mode=on", "mode")):
        with pytest.raises(ConfigError, match=rf"logger\.{key}"):
            config(override)


def test_profiling_leaves_a_trace_and_a_table(tmp_path):
    train(tmp_path, "runtime.profile_steps=3", "recipe.epochs=2")
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    seen = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert seen == {"ProfilerStep#5", "ProfilerStep#6", "ProfilerStep#7"}
    assert "aten::convolution" in (tmp_path / "profile" / "operations.txt").read_text()


# ---- elsewhere --------------------------------------------------------------------------------------------------


def slurm_launcher(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = compose("train", ["hydra/launcher=slurm", *overrides], return_hydra_config=True)
    return OmegaConf.to_container(composed.hydra.launcher, resolve=True)


def test_slurm_asks_for_what_the_run_takes():
    made = slurm_launcher("runtime.nodes=2", "runtime.devices=4", "runtime.workers=7", "hydra.launcher.partition=gpu")
    assert (made["nodes"], made["tasks_per_node"], made["gpus_per_node"], made["cpus_per_task"]) == (2, 1, 4, 32)
    assert made["partition"] == "gpu" and made["name"] == "resnet_digits"
    assert made["additional_parameters"]["signal"] == f"USR1@{made['signal_delay_s']}"
    assert made["setup"] == ["export SUBMITIT_PREEMPT_SIGNAL=USR1"] and made["max_num_timeout"] > 0
    assert slurm_launcher("runtime.device=cpu")["gpus_per_node"] is None


@pytest.mark.parametrize(
    "nodes, hosts",
    [
        ("node7", ["node7"]),
        ("node[07-09,12],other", ["node07", "node08", "node09", "node12", "other"]),
        ("rack[1-2]n[3,5]", ["rack1n3", "rack1n5", "rack2n3", "rack2n5"]),
        ("a-1.b.c,a-2.b.c", ["a-1.b.c", "a-2.b.c"]),
        ("gpu[5,1-2]x", ["gpu5x", "gpu1x", "gpu2x"]),
    ],
)
def test_nodes_meet_at_the_first_host(nodes, hosts):
    from submitit.slurm.slurm import _parse_node_list

    assert _parse_node_list(nodes) == hosts
    endpoint, name = rendezvous({"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": nodes})
    assert (endpoint, name) == (f"{hosts[0]}:{15000 + 123456 % 15000}", "123456.0")


def test_a_requeued_job_meets_under_another_name():
    environ = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "a[1-2]"}
    assert rendezvous(environ) != rendezvous({**environ, "SLURM_RESTART_COUNT": "1"})
    for damaged in ("", "a[1-2", "]a", ",a"):
        with pytest.raises(ValueError, match="SLURM_JOB_NODELIST"):
            first_host(damaged)


def test_several_nodes_must_know_where_they_meet(monkeypatch):
    made = config("runtime.nodes=2").runtime
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError, match=r"runtime\.rendezvous"):
        meeting_point(made, "a")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    assert meeting_point(made, "a") == ("node1:15041", "41.0")
    made.rendezvous = "host:1"
    assert meeting_point(made, "a") == ("host:1", "a")  # jobs of other names must not join


def test_a_launcher_without_a_sweep_is_refused(tmp_path):
    done = launch("hydra/launcher=submitit_local", cwd=tmp_path, check=False)
    assert done.returncode != 0 and "add -m" in done.stderr and not (tmp_path / "runs").exists()


def test_submitit_runs_the_jobs_of_a_sweep_here(tmp_path):
    """Three good jobs, of which two are one run, and a bad one: that does not stop the others, and is listed."""
    done = launch("-m", "dynamic=static,kw", "n=3/2,1", "label=x", "hydra/launcher=local", "logger=wandb",
                  cwd=tmp_path, check=False)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "runs on core" in done.stdout and "logger=wandb: done" in done.stdout  # the states
    (failed,) = done.stderr[done.stderr.index("1 jobs of this sweep are not done:") :].splitlines()[1:]
    assert "dynamic=kw n=3/2 label=x" in failed and "ConfigError: n='3/2'" in failed
    found = {json.loads(path.read_text())["n"]: path.parent for path in tmp_path.rglob("summary.json")}
    assert found.keys() == {"static", "1"}
    (one, group, _), (other, same, _) = map(wandb_run, found.values())
    assert len(one) == len(other) == 1 and one != other
    assert group == same and group.pop().startswith("dynamic-static,kw+n-1.5,1+backbone.kwargs")
    assert sum("Skipped, the same run as job" in path.read_text() for path in tmp_path.rglob("*.out")) == 1
    assert any("dynamic=kw n=3/2" in remark for remark in find_runs([tmp_path])[1])


FAKES = {
    "sbatch": """
        export SLURM_JOB_ID=41 SLURM_JOB_NODELIST=node[1-2]
        cp "$1" job.sh
        (bash job.sh; [ -e scontrol.log ] && SLURM_RESTART_COUNT=1 bash job.sh) >job.log 2>&1 &
        echo Submitted batch job 41""",
    "srun": 'shift 3; exec "$@"',  # --unbuffered --output FILE
    "sacct": r'printf "JobID|State|NodeList\n41|RUNNING|node1\n"',
    "scontrol": 'echo "$@" >>scontrol.log',
}


@pytest.mark.slow
@pytest.mark.parametrize(("program", "devices"), [("train", 1), ("train", 2), ("detection", 1)])
def test_a_slurm_job_at_its_time_limit_is_requeued_and_goes_on(tmp_path, program, devices):
    """SLURM's commands are fakes: sbatch starts the job here, and again if scontrol was called."""
    for name, script in FAKES.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script.strip()}\n")
        path.chmod(0o755)
    epochs, settings = 20, [*TINY, *NARROW, "n=static", "recipe.epochs=20", "runtime.device=cpu"]
    if program == "detection":
        epochs, settings = 3, case_of(program, tmp_path).settings
    command = [sys.executable, "-m", program, "-m", *settings, f"runtime.devices={devices}", "hydra/launcher=slurm"]
    environ = {**environment(), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True) as launcher:
        wait_for(lambda: any(tmp_path.rglob("last.pt")), launcher, 180)
        os.kill(int(process_of(tmp_path)), signal.SIGUSR1)
        _, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, errors
    log = (tmp_path / "job.log").read_text()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 41\n"
    assert "back in the queue" in log and "Resumed" in log
    (summary,) = tmp_path.rglob("summary.json")
    assert json.loads(summary.read_text())["epochs"] == epochs


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)


def process_of(folder):
    """The job's process: the one that runs submitit's main in `folder`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"submitit.core._submit" in words and any(str(folder).encode() in word for word in words):
            return entry.name
    raise AssertionError("no job is running")
