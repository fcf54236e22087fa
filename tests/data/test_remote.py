"""Shards from a URL are those of the folder, to the bit, whatever happens to connections; or the run ends by a line."""

import errno
import fcntl
import itertools
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import programs
from helpers.flaky_server import serve
from helpers.image_sets import add_to_shard, flat, loaded, png, samples_of
from helpers.programs import finish, ranks

import train.data.remote
from scripts.data.index import index_shards
from scripts.kill_storm import differences, outcome
from train.config import DataConfig, RemoteConfig
from train.data.batching import MicroBatches
from train.data.formats import open_split
from train.data.loader import eval_loader
from train.data.order import deal
from train.data.remote import Cache, Remote, digest_of, url_of
from train.data.remote_shards import parse_index
from train.jobs.errors import ConfigError, DataError
from train.jobs.reading import read

SHARD = "train-000001.tar"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(train.data.remote, "FIRST_WAIT", 0.01)


@pytest.fixture
def server(shards):
    with serve(shards) as server:
        yield server


@pytest.fixture
def remote(server, tmp_path):
    """Settings that read from the server."""
    made = RemoteConfig(cache=str(tmp_path / "kept"), retries=2, timeout=0.5)
    return DataConfig(format="shards", root=server.url, image_size=16, window=2, remote=made)


def local(shards, **settings):
    return DataConfig(format="shards", root=str(shards), image_size=16, window=2, **settings)


def test_a_url_holds_what_the_folder_does(shards, remote):
    for split in ("train", "val"):
        there, here = open_split(remote, split), open_split(local(shards), split)
        assert there.classes == here.classes and there.targets.tolist() == here.targets.tolist()
        assert [there.read(k) for k in range(len(there))] == [here.read(k) for k in range(len(here))]
        assert [Path(there.describe(k)).name for k in range(5)] == [Path(here.describe(k)).name for k in range(5)]


@pytest.mark.parametrize("parts", [1, 2])
def test_batches_are_those_of_the_folder_also_after_a_resumption(shards, remote, server, parts):
    remote.parts = parts
    server.plan = {
        f"train-00000{k}.tar": [fault] for k, fault in enumerate(("drop", "truncate", "short", "503", "flip"))
    }
    expected = flat(loaded(samples_of(local(shards, parts=parts))))
    assert flat(loaded(samples_of(remote), workers=2)) == expected
    assert not any(server.plan.values())  # all of the faults were met
    for world, workers in ((1, 0), (2, 2)):
        shutil.rmtree(remote.remote.cache)
        resumed = flat(loaded(samples_of(remote), workers, world, start=3))
        assert resumed == {key: rows for key, rows in expected.items() if key[0] >= 3}


@pytest.mark.parametrize("fault", ["drop", "truncate", "short", "stall", "503", "flip"])
def test_a_fault_is_retried_so_many_times_and_then_named(remote, server, fault, capsys):
    images = open_split(remote, "train")
    first = int(images.starts[1])
    server.plan[SHARD] = [fault] * 2
    remote.remote.timeout = 0.3
    assert len(images.read(first)) > 0 and server.asked[SHARD] == 3
    assert capsys.readouterr().err.count(f"{server.url}/{SHARD}") == 2  # each retry is told
    shutil.rmtree(remote.remote.cache)
    images, server.always[SHARD] = open_split(remote, "train"), fault
    with pytest.raises(DataError) as stopped:
        images.read(first)
    message = str(stopped.value)
    assert server.asked[SHARD] == 6 and "\n" not in message
    assert f"{server.url}/{SHARD} could not be read in 3 tries" in message and "data.remote.retries=2" in message
    assert not list(Path(remote.remote.cache).glob("*.part"))


def test_what_will_not_change_is_not_retried(remote, server):
    server.always[SHARD] = "404"
    images = open_split(remote, "train")
    with pytest.raises(DataError, match=rf"{SHARD} cannot be read.*404.*data\.root"):
        images.read(int(images.starts[1]))
    assert server.asked[SHARD] == 1


@pytest.mark.parametrize("fault", ["drop", "truncate", "short", "stall", "503"])
def test_the_index_is_read_whole_or_not_at_all(remote, server, fault):
    server.plan["train.index.npz"] = [fault] * 2
    assert len(open_split(remote, "train")) == 17
    server.always["train.index.npz"] = fault
    with pytest.raises(DataError, match=r"train\.index\.npz could not be read in 3 tries.*scripts\.data\.index"):
        open_split(remote, "train")


def test_no_bit_of_the_index_changes_unnoticed(shards):
    content = (shards / "train.index.npz").read_bytes()
    whole = parse_index(content)
    damaged = 0
    for place in range(0, len(content), 13):
        try:
            found = parse_index(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        except Exception:
            damaged += 1
        else:  # a date, or the like
            assert all((found[key] == whole[key]).all() for key in found)
    assert damaged > len(content) / 13 / 2


def test_a_missing_index_or_one_of_something_else(remote, server, shards):
    with pytest.raises(DataError, match=r"nope\.index\.npz cannot be read.*404.*scripts\.data\.index FOLDER"):
        open_split(remote, "nope")
    with (shards / "other.index.npz").open("wb") as file:
        torch.save({}, file)  # a zip file as well
    with pytest.raises(DataError, match=r"other\.index\.npz"):
        open_split(remote, "other")


def test_a_shard_that_was_changed_after_it_was_indexed_stops_the_run(remote, shards):
    images = open_split(remote, "train")
    add_to_shard(shards / SHARD, {"x.png": png(), "x.cls": b"0"})
    with pytest.raises(DataError, match=r"bytes, and \d+ by the index"):
        images.read(int(images.starts[1]))


def test_each_rank_reads_shards_of_its_own(tmp_path):
    for k in range(8):
        files = [{f"{k}{n}.png": png(k * 4 + n), f"{k}{n}.cls": b"0"} for n in range(4)]
        add_to_shard(tmp_path / f"train-{k}.tar", {name: content for one in files for name, content in one.items()})
    images = open_split(DataConfig(format="shards", root=str(tmp_path), window=1, parts=4), "train")
    for accumulation, repeats in ((1, 1), (2, 1)):
        read = []
        for rank in (0, 1):
            batches = MicroBatches(
                32, batch_size=8, accumulation=accumulation, steps=4, seed=1, repeats=repeats, rank=rank, world=2,
                order=images.order, parts=4,
            )  # fmt: skip
            keys = list(itertools.chain.from_iterable(batches))
            read.append({images.shard_of(key.index) for key in keys})
            assert len({key.index for key in keys}) == 16
        assert len(read[0]) == len(read[1]) == 4 and not read[0] & read[1]


def test_parts_share_one_shard_at_most_and_lose_no_sample(shards):
    for parts, window in itertools.product((1, 2, 3, 5), (1, 2, 9)):
        data = local(shards, parts=parts)
        data.window = window
        images = open_split(data, "train")
        order = images.order(3, 1)
        assert sorted(order.tolist()) == list(range(17))
        size = 17 // parts
        read = [{images.shard_of(k) for k in part.tolist()} for part in order[: size * parts].split(size)]
        assert all(len(one & next_) <= 1 for one, next_ in itertools.pairwise(read))
        dealt = deal(order, parts, parts * 2)
        assert len(dealt) == 17 // (parts * 2) * parts * 2 == len(set(dealt.tolist()))


def test_evaluation_from_a_url_sees_every_sample_once(remote):
    seen = []
    for rank in range(3):
        samples = samples_of(remote, "val")
        seen += [k for batch in eval_loader(samples, 4, 0, False, rank, 3) for k in batch.indices.tolist()]
    assert sorted(seen) == list(range(13))


# ---- the cache ------------------------------------------------------------------------------------------------------


def known(server, name, shards):
    size, digest = digest_of(iter([(shards / name).read_bytes()]))
    return Remote(f"{server.url}/{name}", size, digest)


def test_the_files_not_used_for_longest_make_room(server, shards, tmp_path):
    for k in range(4):
        add_to_shard(shards / f"train-00000{k}.tar", {"x.png": bytes([k]) * 9000})
    files = [known(server, f"train-00000{k}.tar", shards) for k in range(4)]
    cache = Cache(RemoteConfig(cache=str(tmp_path / "kept"), cache_gb=sum(file.size for file in files[:3]) / 1e9))
    for age, file in zip((30, 20, 10), files, strict=False):
        os.utime(cache.fetch(file), (1e9 - age, 1e9 - age))
    cache.read(files[0], 0, 10)  # it is the last that was used
    opened = cache.fetch(files[1]).open("rb")
    paths = [cache.fetch(file) for file in (files[3], files[0], files[2])]
    assert not (cache.folder / f"{files[1].digest}.tar").exists() and all(path.exists() for path in paths)
    assert digest_of(iter([opened.read()])) == (files[1].size, files[1].digest)  # a reader of it is not disturbed
    assert cache.read(files[1], 0, files[1].size) == (shards / "train-000001.tar").read_bytes()


def test_a_download_that_was_killed_is_no_obstacle(server, shards, tmp_path):
    file = known(server, SHARD, shards)
    cache = Cache(RemoteConfig(cache=str(tmp_path / "kept"), cache_gb=file.size / 1e9))
    (cache.folder / f"{file.digest}.tar").write_bytes(b"")  # after a power failure
    part = cache.folder / f"{file.digest}.host.1.1.part"
    part.write_bytes(b"half")
    os.utime(part, (1e9, 1e9))
    assert cache.read(file, 0, file.size) == (shards / SHARD).read_bytes() and not part.exists()


def test_a_shard_is_downloaded_once_for_all_who_want_it(server, shards, tmp_path):
    file = known(server, SHARD, shards)
    caches = [Cache(RemoteConfig(cache=str(tmp_path / "kept"))) for _ in range(8)]
    threads = [threading.Thread(target=cache.fetch, args=(file,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked[SHARD] == 1


def test_a_worker_that_was_forked_during_a_download_does_not_keep_the_lock(server, shards, tmp_path):
    file = known(server, SHARD, shards)
    cache = Cache(RemoteConfig(cache=str(tmp_path / "kept")))
    forks = multiprocessing.get_context("fork")
    done = forks.Event()
    with cache._lock(file.digest):
        worker = forks.Process(target=done.wait, args=(60,))
        worker.start()
    with (cache.folder / f"{file.digest[:2]}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it would raise
    done.set()
    worker.join()


def test_without_locks_in_the_file_system_shards_are_still_whole(server, shards, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    file = known(server, SHARD, shards)
    cache = Cache(RemoteConfig(cache=str(tmp_path / "kept")))
    assert cache.read(file, 0, file.size) == (shards / SHARD).read_bytes()


def test_a_cache_that_cannot_be_written_is_named(remote, tmp_path, monkeypatch):
    images = open_split(remote, "train")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match=r"No space left on device.*data\.remote\.cache=PATH"):
        images.read(0)
    remote.remote.cache = str(tmp_path / "images" / "README" / "below a file")
    with pytest.raises(ConfigError, match=r"data\.remote\.cache="):
        open_split(remote, "train")
    remote.remote.cache_gb = 1e-6
    remote.remote.cache = str(tmp_path / "kept")
    with pytest.raises(ConfigError, match=r"data\.remote\.cache_gb=1e-06 is too small"):
        open_split(remote, "train")


# ---- commands and other schemes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["pipe:cat {folder}/{{}} | cat", "file://{folder}"])
def test_commands_and_what_fsspec_opens(shards, remote, root):
    remote.root = root.format(folder=shards)
    there, here = open_split(remote, "train"), open_split(local(shards), "train")
    assert [there.read(k) for k in range(17)] == [here.read(k) for k in range(17)]
    assert [Path(there.describe(k)).name for k in range(5)] == [Path(here.describe(k)).name for k in range(5)]


@pytest.mark.parametrize(
    "command, words",
    [
        ("echo no such bucket >&2; false {}", "the command ended with status 1: no such bucket"),
        ("sleep 60 | cat; cat {}", r"no bytes came for 0\.2 s"),
        ("false {} | cat", "not a complete index"),  # a shell takes the status of a pipeline's last command
    ],
)
def test_a_command_that_fails_is_retried_and_named(remote, command, words):
    remote.root, remote.remote.timeout, remote.remote.retries = f"pipe:{command}", 0.2, 1
    with pytest.raises(DataError, match=rf"could not be read in 2 tries: .*{words}"):
        open_split(remote, "train")


def test_roots_that_cannot_be(remote):
    with pytest.raises(ConfigError, match=r"needs \{\} where the file's name belongs"):
        url_of("pipe:aws s3 cp s3://bucket", "x.tar")
    remote.root = "nosuch://bucket/x"
    with pytest.raises(ConfigError, match=r"nosuch.*pipe:"):
        open_split(remote, "train")
    with pytest.raises(ConfigError, match=r"data\.root='https://x/y'.*data=remote"):
        DataConfig(format="folder", root="https://x/y")
    with pytest.raises(ConfigError, match=r"data\.parts=2: applies to data\.format=shards"):
        DataConfig(format="folder", root="x", parts=2)


def test_shards_that_are_only_at_a_url_can_be_indexed(server, shards, remote, tmp_path):
    names = sorted(path.name for path in shards.glob("*.tar"))
    server.plan = {SHARD: ["truncate"]}
    index_shards(server.url, ["train", "val"], tmp_path / "index", names, classes=shards)
    for split in ("train", "val"):
        (shards / f"{split}.index.npz").unlink()
    remote.remote.index = str(tmp_path / "index")
    there, here = open_split(remote, "train"), open_split(local(shards), "train")
    assert there.classes == here.classes and there.read(5) == here.read(5)
    with pytest.raises(ConfigError, match="no shards test-"):
        index_shards(server.url, ["test"], tmp_path / "index", names)


# ---- runs -----------------------------------------------------------------------------------------------------------

RUN = ("n=static", "recipe=digits", "recipe.epochs=2", "recipe.batch_size=4", "recipe.warmup_epochs=0",
       "backbone=resnet_digits", "backbone.kwargs.channels=[8,8,8,16]", "backbone.kwargs.stem_width=8",
       "data.image_size=16", "data.parts=2", "data.window=1", "runtime.workers=1", "runtime.device=cpu",
       "runtime.checkpoint_steps=5")  # fmt: skip
KILLED_AT_STEP_6 = "at(trainer, 6, lambda: os.kill(os.getpid(), signal.SIGKILL))"  # in the middle of the second epoch


@pytest.mark.slow
def test_a_killed_run_from_a_bad_server_ends_as_one_from_the_folder_does(shards, server, tmp_path):
    """Two processes with a worker each. Shards are dropped, cut off and refused before the kill and after it."""
    for process in ranks(2, "train", *RUN, "data=shards", f"data.root={shards}", f"hydra.run.dir={tmp_path}/folder"):
        finish(process)
    words = (*RUN, "data=remote", "data.name=shards", f"data.root={server.url}", "data.remote.timeout=2")
    names = [f"train-00000{k}.tar" for k in range(5)]
    server.plan = {
        name: [fault] for name, fault in zip(names, ("drop", "truncate", "short", "503", "flip"), strict=True)
    }
    (tmp_path / "code.py").write_text(KILLED_AT_STEP_6)
    first = [*words, f"data.remote.cache={tmp_path}/first"]
    for process in ranks(2, "helpers.disturbed", tmp_path / "code.py", tmp_path / "url", *first):
        finish(process, code=None)
    assert read(tmp_path / "url" / "checkpoints" / "last.pt")["step"] == 6 - 1
    assert not any(server.plan.values())
    server.plan = {
        name: [fault] for name, fault in zip(names, ("flip", "503", "short", "truncate", "drop"), strict=True)
    }
    again = [*words, f"data.remote.cache={tmp_path}/second", f"hydra.run.dir={tmp_path}/url"]
    for process in ranks(2, "train", *again):
        finish(process)
    assert differences(outcome(tmp_path / "folder"), outcome(tmp_path / "url")) == []


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_run_that_loses_its_server_ends_with_one_line(server, tmp_path, workers):
    server.always[SHARD] = "truncate"
    settings = (f"data.root={server.url}", f"runtime.workers={workers}", f"data.remote.cache={tmp_path}/kept")
    words = (*RUN, "data=remote", "data.remote.retries=1", *settings, f"hydra.run.dir={tmp_path}/run")
    done = programs.run("train", *words, code=None)
    *retries, last = done.stderr.strip().splitlines()
    assert f"{server.url}/{SHARD} could not be read in 2 tries" in last and "data.remote.retries=1" in last
    assert last.startswith("DataError: ") and all(line.startswith("Warning: ") for line in retries), done.stderr
