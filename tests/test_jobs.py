"""What both programs share: names, what may change on a resume, saved configurations, locks, numbers of processes."""

import dataclasses
import errno
import fcntl
import itertools
import multiprocessing
import os
import secrets
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from helpers.training import ALONE, NARROW, TINY, config, launch
from hydra import initialize_config_dir

from train.config import RuntimeConfig, TrainConfig, learnt_settings, load_saved, saved, to_plain, validate
from train.jobs import folder as run_folder
from train.jobs import lease, outcomes
from train.jobs.checkpoints import Checkpoints
from train.jobs.errors import CheckpointError, ConfigError
from train.jobs.launch import count_processes
from train.jobs.names import MAX_NAME, extended, same, shorten
from train.jobs.reading import FORMAT, read
from train.jobs.settings import fixed_settings
from train.jobs.sweep import CONFIGS, sweep_name
from train.jobs.torchrun import is_main, under_torchrun
from train.trainer import Trainer

# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one, other", [
    (["recipe.lr=2e-2"], ["recipe.lr=0.02"]),
    (["n=0.25"], ["n=1/4"]),
    (["kw.reduction=0.03125"], ["kw.reduction=1/32"]),
    (["recipe.lr=2e-3", "recipe.decay_rate=.1", "data=digits", "recipe=digits", "seed=0", "dynamic=kw"], []),
    (["backbone.kwargs.channels=[64,64,64,128]", "recipe.augment.hflip=0.0"], []),
    (["runtime.workers=3", "logger=both", "label=${backbone.label}", "resume=never"], []),
    (["backbone=timm", "backbone.name=resnet18"], ["backbone=resnet18", "recipe=digits"]),
])  # fmt: skip
def test_a_name_follows_from_values_and_not_from_how_they_were_typed(one, other):
    assert config(*one).name == config(*other).name


def test_a_name_shows_what_differs_from_the_chosen_groups():
    imagenet = ("experiment=resnet18_kw1d4x", "data.root=x")
    assert config(*imagenet).name == config(*imagenet, "recipe.mixup=0").name == "resnet18_kw1d4x"
    assert config(*imagenet, "recipe.mixup=0.8").name == "resnet18_kw1d4x+recipe.mixup-0.8"
    assert config(*imagenet, "recipe=sgd_100e").name == "resnet18_kw1d4x+recipe-sgd_100e"
    assert config(*imagenet, "recipe=sgd_100e", "recipe.lr=1e-1").name == "resnet18_kw1d4x+recipe-sgd_100e"
    assert config("kw.reduction=0.0625", "runtime.precision=bfloat16").name.endswith(
        "+kw.reduction-1_16+runtime.precision-bfloat16"
    )
    assert config("~backbone.kwargs.stem_width").name == "resnet_digits_kw1x+backbone.kwargs.stem_width-null"
    assert config("name=mine", "recipe.lr=1").name == "mine"


def test_every_group_but_those_in_the_path_changes_the_name_by_what_it_sets():
    names = [config(f"recipe={name}").name for name in ("digits", "sgd_100e", "sgd_150e", "adamw_300e", "deit_300e")]
    assert len(set(names)) == len(names)


def test_a_long_name_is_cut_and_still_another_ones():
    long = [extended("x", {f"recipe.{letter * 50}": value for letter in "abc"}) for value in (1, 2)]
    assert long[0] != long[1] and all(len(name) <= MAX_NAME + 9 for name in long)
    assert shorten("x" * MAX_NAME) == "x" * MAX_NAME


def test_what_is_the_same_value():
    assert same(0.1, "0.10") and same(1, "1") and same(None, None) and same([1, 2], [1, 2])
    assert not (same(1, True) or same("a", "b") or same(0, None) or same("1/0", "1/00"))


@pytest.mark.parametrize("words, name", [
    (["n=1/4,1", "recipe.lr=2e-2,0.1"], "n-0.25,1+recipe.lr-0.02,0.1"),
    (["n=0.25,1.0", "recipe.lr=0.02,1e-1", "data=digits", "seed=0", "resume=never"], "n-0.25,1+recipe.lr-0.02,0.1"),
    (["seed=0,1", "recipe.epochs=12", "data=cifar10", "logger=wandb", "label=x"], "seed-0,1+data-cifar10"),
    (["experiment=glob(resnet18_*)", "recipe.mixup=0.5"], "experiment-glob-resnet18_-+recipe.mixup-0.5"),
    (["runtime.micro_batch=32,64"], "runtime.micro_batch-32,64"),
    (["n=1"], ""),
])  # fmt: skip
def test_a_sweep_s_name_says_what_it_sweeps_over_and_what_differs(words, name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert sweep_name(words, "train") == name


# ---- what may change ------------------------------------------------------------------------------------------------

MAY_CHANGE = {
    "data.root", "evaluate", "freeze", "label", "name", "resume", "logger",
    *(f"data.remote.{key}" for key in ("index", "cache", "cache_gb", "retries", "timeout")),
    *(f"runtime.{key}" for key in (
        "device", "devices", "nodes", "rendezvous", "micro_batch", "workers", "channels_last", "compile",
        "checkpoint_steps", "keep_best", "profile_steps",
    )),
}  # fmt: skip


def leaves(kind, prefix=""):
    for field in dataclasses.fields(kind):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type) and key not in MAY_CHANGE:
            yield from leaves(field.type, f"{key}.")
        else:
            yield key


def test_every_field_but_these_must_stay_as_it_was_when_a_run_is_resumed():
    """A new field is one that must: whoever adds it decides otherwise by marking it, and here."""
    made = dataclasses.asdict(config())
    made["backbone"]["kwargs"] = "a value"  # its keys are the user's
    fixed = fixed_settings(made, TrainConfig)
    every = set(leaves(TrainConfig))
    assert every >= MAY_CHANGE
    assert fixed.keys() == every - MAY_CHANGE
    assert {field.name for field in dataclasses.fields(RuntimeConfig)} == {
        key.partition(".")[2] for key in every if key.startswith("runtime.")
    }


# ---- saved configurations -------------------------------------------------------------------------------------------


def test_a_saved_configuration_is_read_as_it_was():
    made = config("n=1/4", "kw.reduction=0.125", "data=folder", "data.root=x", "recipe.betas=[0.5,0.5]")
    plain = to_plain(made)
    assert load_saved(plain) == made and plain == to_plain(made)  # which is left alone
    assert plain["version"] == saved.VERSION


def test_keys_that_were_renamed_or_removed_are_read_and_unknown_ones_named(monkeypatch, capsys):
    old = to_plain(config("recipe.lr=0.5"))
    old["recipe"]["learning_rate"] = old["recipe"].pop("lr")
    old["recipe"]["augment"]["rotation"] = 3
    old["whim"] = {"a": 1}
    old["given"] = ["recipe.lr"]  # version 1 had it, without a number
    del old["version"]
    monkeypatch.setattr(saved, "VERSION", 3)
    monkeypatch.setitem(saved.MIGRATIONS, 2, {"recipe.learning_rate": "recipe.lr", "recipe.gone": None})
    assert load_saved(old) == validate({**to_plain_without_version(config("recipe.lr=0.5"))})
    said = capsys.readouterr().err
    assert "given" not in said and said.count("\n") == 1
    assert "unknown here, and are ignored: whim, recipe.augment.rotation." in said


def to_plain_without_version(made):
    return {key: value for key, value in to_plain(made).items() if key != "version"}


def test_a_run_of_an_older_version_is_resumed(tmp_path, capsys):
    trainer = Trainer(config(*TINY, *NARROW, "n=static"), tmp_path, ALONE)
    state = trainer.state()
    state["config"] |= {"version": 1, "given": [], "unheard_of": True}
    trainer.checkpoints.save(state)
    Trainer(config(*TINY, *NARROW, "n=static"), tmp_path, ALONE).resume()
    assert "unheard_of" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"recipe\.lr"):
        Trainer(config(*TINY, *NARROW, "n=static", "recipe.lr=1"), tmp_path, ALONE).resume()


def test_a_value_typed_differently_is_resumed(tmp_path):
    made = [config(*TINY, *NARROW, f"kw.reduction={value}", f"n={n}") for value, n in (("1/32", 0.5), (0.03125, "1/2"))]
    assert learnt_settings(made[0]) == learnt_settings(made[1])


# ---- processes and folders ------------------------------------------------------------------------------------------


def torchrun(monkeypatch, world, local=None):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))


@pytest.mark.parametrize("world, local, made", [(8, 8, (8, 1)), (8, 4, (4, 2)), (3, None, (3, 1))])
def test_under_torchrun_the_configuration_says_how_many_processes_there_are(world, local, made, monkeypatch):
    torchrun(monkeypatch, world, local)
    runtime = RuntimeConfig()
    count_processes(runtime)
    assert (runtime.devices, runtime.nodes) == made
    count_processes(runtime)  # they agree now
    with pytest.raises(ConfigError, match=rf"runtime\.devices=2 and runtime\.nodes=3 make 6 .* started {world}"):
        count_processes(RuntimeConfig(devices=2, nodes=3))
    with pytest.raises(ConfigError, match=rf"runtime\.devices=1 .* torchrun has started {world}"):
        count_processes(RuntimeConfig(), ["seed", "runtime.devices"])


def test_a_rank_that_a_scheduler_sets_is_not_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert not under_torchrun()
    runtime = RuntimeConfig(devices=2)
    count_processes(runtime)
    assert runtime.devices == 2


def test_processes_that_start_together_agree_on_a_run_s_id(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        for number in range(20):
            tries = [secrets.token_hex(4) for _ in range(4)]
            ids = set(pool.map(run_folder.write_once, itertools.repeat(tmp_path / str(number), 4), tries))
            assert ids == {(tmp_path / str(number)).read_text()} and len(ids.pop()) == 8
    assert len(list(tmp_path.iterdir())) == 20  # no temporary file is left


def test_a_file_system_without_hard_links_keeps_the_best_checkpoint_and_the_run_s_id(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    checkpoints = Checkpoints(tmp_path)
    for epoch, top1 in enumerate((1.0, 3.0, 2.0)):
        checkpoints.save_epoch({"format": FORMAT}, epoch, top1)
    assert [path.name for path in tmp_path.glob("best-*.pt")] == ["best-0001.pt"]
    assert read(tmp_path / "best-0001.pt")["epoch"] == 1
    assert run_folder.write_once(tmp_path / "id", "a") == run_folder.write_once(tmp_path / "id", "b") == "a"


def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_file_system_without_locks_does_not_keep_a_job_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with run_folder.lock(tmp_path):
        assert (tmp_path / ".lease-1").exists()
    assert f"{tmp_path} is on a file system without locks (No locks available)" in capsys.readouterr().err
    assert not list(tmp_path.glob(".lease-*"))


def compete(folder, monkeypatch, count=8):
    """How many of `count` processes that start at once get the lock of a folder, while all of them wait for it."""
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.3)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    fork = multiprocessing.get_context("fork")
    start, end, got = fork.Barrier(count), fork.Barrier(count), fork.Value("i", 0)

    def work():
        start.wait()
        try:
            held = run_folder.lock(folder)
            with got.get_lock():
                got.value += bool(held)
        except ConfigError as error:
            assert "Another job is running" in str(error)
        end.wait()
        os._exit(0)  # as a killed job, without giving it back

    processes = [fork.Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return got.value


@pytest.mark.parametrize("locks", [True, False])
def test_of_eight_processes_on_one_folder_one_gets_it_and_the_next_job_too(locks, tmp_path, monkeypatch):
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(3):  # each leaves what a killed job leaves
        assert compete(tmp_path, monkeypatch) == 1
    run_folder.lock(tmp_path).close()


def test_a_job_of_another_host_is_waited_for_while_it_beats_and_replaced_when_it_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    with monkeypatch.context() as there:
        there.setattr(lease, "_host", lambda: "another")
        held = run_folder.lock(tmp_path)
    os.utime(held.path, (2e9, 2e9))  # its clock is ahead of ours
    with pytest.raises(ConfigError, match="Another job is running"):
        run_folder.lock(tmp_path)
    held._closed.set()  # it was killed: nothing beats, and nothing is removed
    held._thread.join()
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.1)
    with run_folder.lock(tmp_path):
        assert [path.name for path in tmp_path.glob(".lease-*")] == [".lease-2"]


def test_a_job_that_stood_still_and_was_replaced_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)

    def stand_still():
        lease.Claim(tmp_path).attempt()
        (tmp_path / ".lease-2").touch()  # another job has waited for long enough
        time.sleep(60)

    job = multiprocessing.get_context("fork").Process(target=stand_still)
    job.start()
    job.join(30)
    assert job.exitcode == 1


def test_a_rank_without_a_world_is_a_schedulers_and_errors_are_still_printed(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    for key in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(key, raising=False)
    assert is_main() and not under_torchrun()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert under_torchrun() and not is_main()


def test_a_lock_that_another_job_may_have_is_not_removed(tmp_path, monkeypatch):
    """flock fails on NFS for a file that is open for reading only, and on some file systems for any."""
    with run_folder.lock(tmp_path):
        run_folder.remove_lock(tmp_path)
        assert (tmp_path / run_folder.LOCK).exists()

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run_folder.remove_lock(tmp_path)
    assert (tmp_path / run_folder.LOCK).exists()
    run_folder.lock(tmp_path).close()  # a warning


@pytest.mark.parametrize("words, where", [
    (["hydra.run.dir=."], "."),
    (["hydra.job.chdir=true", "hydra.sweep.dir=here", "name=c"], "here/digits/c/seed0"),
    (["hydra.run.dir=there"], "there"),
])  # fmt: skip
def test_the_run_folder_is_where_the_user_wants_it(words, where, tmp_path):
    launch("n=static", *words, cwd=tmp_path)
    assert (tmp_path / where / "summary.json").exists()


def test_a_sweep_of_a_timm_model_has_a_name():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert sweep_name(["backbone=timm", "backbone.name=resnet10t", "label=x", "n=1,4"], "train").startswith("n-1,4")


def test_a_sweep_of_detectors_is_named_by_the_file_and_the_budget():
    pytest.importorskip("mmdet")
    import detection.config  # noqa: F401  registers its schema

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        name = sweep_name(["config=mask_rcnn_kw1x_digits", "seed=0,1", "n=4"], "detection")
    assert "mask_rcnn_kw1x_digits" in name and "n-4" in name


def test_jobs_of_a_sweep_in_processes_of_their_own_do_not_share_a_run_folder(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert outcomes.claim(tmp_path, 0, a, {"n": 1}) is None and outcomes.claim(tmp_path, 1, b, {"n": 2}) is None
    assert outcomes.claim(tmp_path, 0, a, {"n": 1}) is None  # it was put back into the queue
    assert outcomes.claim(tmp_path, 2, a, {"n": 1}) == 0
    with pytest.raises(ConfigError, match="Another job of this sweep has the run folder"):
        outcomes.claim(tmp_path, 3, a, {"n": 4})


def test_jobs_that_are_not_done_are_listed_until_another_sweep_has_done_them(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    for sweep, states in (
        (first, ("done", "DataError: x", outcomes.RUNS)),
        (second, ("done", "done", "left with 143")),
    ):
        sweep.mkdir()
        for number, state in enumerate(states):
            outcomes.note(sweep, number, f"n={number}", state)
    assert outcomes.not_done([first]) == ["n=1: DataError: x", f"n=2: {outcomes.RUNS}"]
    assert outcomes.not_done([first, second]) == ["n=2: left with 143"]
    outcomes.note(second, 2, "n=2", "done")
    assert outcomes.end(second) == [] and not second.exists() and first.exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_text("this is no checkpoint\n" * 9), "is damaged, cut off, or not a checkpoint"),
        (lambda path: path.write_bytes(b""), "is damaged, cut off, or not a checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged, cut off, or not a checkpoint"),
        (lambda path: flip(path), r"is damaged: the checksum of .*data/0 does not fit"),
    ],
    ids=["text", "empty", "cut", "flipped bit of a weight"],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage, said, tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"weights": torch.full((1000,), 7.0)}, path)
    read(path)
    damage(path)
    with pytest.raises(CheckpointError, match=rf"last\.pt {said}") as error:
        read(path)
    assert "\n" not in str(error.value)


def flip(path):
    """Flip one bit of a weight, which torch.load does not notice."""
    content = bytearray(path.read_bytes())
    at = bytes(content).index(torch.full((1000,), 7.0).numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], torch.full((1000,), 7.0))
