"""Errors name what is wrong: the file, the class, the shard, the setting."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest
from helpers.image_sets import add_to_shard, make_tar, png, samples_of
from helpers.images import save_image

import scripts.data.shards
from scripts.data.shards import make_shards
from train.config import DataConfig
from train.data.formats import open_split
from train.data.images import BrokenImage
from train.data.order import Key
from train.data.run_data import check_same_classes
from train.jobs.errors import ConfigError, DataError


def refusal(split="train", **settings):
    with pytest.raises((ConfigError, DataError)) as refused:
        open_split(DataConfig(**{key: str(value) for key, value in settings.items()}), split)
    return str(refused.value)


def test_a_compressed_archive_is_refused_with_the_way_out(archive, tmp_path):
    packed = tmp_path / "images.tar.gz"
    packed.write_bytes(gzip.compress(archive.read_bytes()))
    for format_ in ("tar", "auto"):
        message = refusal(format=format_, root=packed)
        assert f"gzip -dk {packed}" in message


@pytest.mark.parametrize("keep", [0, 100, 512, 5000, -600, -512 * 40])
def test_a_truncated_archive_is_refused(archive, keep):
    content = archive.read_bytes()
    end = len(content.rstrip(b"\0"))  # of the last file; zeros follow
    archive.write_bytes(content[: keep if keep >= 0 else end + keep])
    assert str(archive) in refusal(format="tar", root=archive)


def test_an_archive_cut_between_two_files_is_refused(archive):
    with tarfile.open(archive) as members:
        last = members.getmembers()[-1]
    content = archive.read_bytes()
    for end in (last.offset, last.offset_data + -(-last.size // 512) * 512):
        archive.write_bytes(content[:end])
        assert f"{archive} is damaged or cut off at byte {end}" in refusal(format="tar", root=archive)
    archive.write_bytes(content[: last.offset] + b"x" * 512 + content[last.offset + 512 :])  # a damaged header
    assert f"byte {last.offset}" in refusal(format="tar", root=archive)


def test_an_archive_that_shrinks_while_it_is_used_stops_the_run(archive):
    samples = samples_of(DataConfig(format="tar", root=str(archive), image_size=16), substitute=True)
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"images\.tar"):
        [samples[Key(0, k)] for k in range(17)]


def test_links_are_refused_by_name(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    save_image(tmp_path / "train" / "a" / "x.png", 0)
    (tmp_path / "train" / "a" / "y.png").symlink_to("x.png")
    path = make_tar(tmp_path / "train", tmp_path / "linked.tar", "train")
    assert "train/a/y.png" in refusal(format="tar", root=path)


@pytest.mark.parametrize("format_", ["folder", "tar"])
def test_a_class_without_images_is_named(folder, tmp_path, format_):
    (folder / "train" / "leer").mkdir()
    root = make_tar(folder, tmp_path / "x.tar") if format_ == "tar" else folder
    assert "leer" in refusal(format=format_, root=root)


@pytest.mark.parametrize("format_", ["folder", "tar"])
def test_hidden_files_and_folders_are_no_classes_and_no_images(folder, tmp_path, format_):
    """As notebooks, git, disk stations and archives of macOS add them: beside the classes, and in them."""
    before = open_split(DataConfig(format="folder", root=str(folder)), "train")
    for name in (".ipynb_checkpoints", ".git", "@eaDir", "__MACOSX", "lost+found"):
        (folder / "train" / name).mkdir()
        save_image(folder / "train" / "猫" / name / "copy.png", 0)
    save_image(folder / "train" / "@eaDir" / "x.png", 0)
    (folder / "train" / "猫" / "._2.webp").write_bytes(b"of macOS")
    root = folder
    if format_ == "tar":
        root = tmp_path / "x.tar"
        with tarfile.open(root, "w") as archive:
            archive.add(folder, arcname="data")
            archive.add(folder, arcname="__MACOSX")
    found = open_split(DataConfig(format=format_, root=str(root)), "train")
    assert found.classes == before.classes and len(found) == len(before) == 17


def test_a_folder_without_a_class_is_named(tmp_path):
    (tmp_path / "train" / ".git").mkdir(parents=True)
    assert f"{tmp_path}/train has no folder of a class" in refusal(format="folder", root=tmp_path)


def test_splits_say_in_which_classes_they_differ():
    data = DataConfig()
    with pytest.raises(ConfigError, match=r"same classes: only 'train' has 'c'; only 'val' has 'a', 'd'\.$"):
        check_same_classes(data, ["b", "c"], ["a", "b", "d"])
    with pytest.raises(ConfigError, match=r"only 'val' has 'a', 'b', 'c', 'd', 'e' and 2 more\.$"):
        check_same_classes(data, [], list("abcdefg"))
    with pytest.raises(ConfigError, match="another order"):
        check_same_classes(data, ["b", "a"], ["a", "b"])
    check_same_classes(data, ["a"], ["a"])


def test_a_missing_root_or_split_is_a_configuration_error(data, tmp_path):
    with pytest.raises(ConfigError, match=r"test.*data\.eval_split"):
        open_split(data, "test", "data.eval_split")
    data.root = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nowhere"):
        open_split(data, "train", "data.train_split")


def test_a_file_that_cannot_be_read_is_a_data_error(data):
    images, root = open_split(data, "train"), Path(data.root)
    for path in [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]:
        path.write_bytes(b"")  # for a reader that has opened it already
        path.unlink()
    for k in range(len(images)):
        with pytest.raises(DataError, match=str(root)) as stopped:
            images.load(k)
        assert not isinstance(stopped.value, BrokenImage)


def test_a_missing_split_or_root_is_named_with_what_there_is(folder, archive, shards, tmp_path):
    for format_, root in (("folder", folder), ("tar", archive), ("shards", shards)):
        message = refusal("test", format=format_, root=root)
        assert "test" in message and "val" in message and "data.eval_split" in message
        assert str(tmp_path / "nowhere") in refusal(format=format_, root=tmp_path / "nowhere")
    assert "data.format=tar" in refusal(format="folder", root=archive)
    assert "data.format=folder" in refusal(format="tar", root=folder)


def test_a_split_that_is_there_twice_is_refused(folder, tmp_path):
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as archive:
        for prefix in ("one", "two"):
            archive.add(folder, arcname=prefix)
    assert "one/train" in (message := refusal(format="tar", root=path)) and "two/train" in message


@pytest.mark.parametrize(
    "files, words",
    [
        ({"k1.png": png()}, "'k1' has .png"),
        ({"k1.cls": b"0"}, "'k1' has .cls"),
        ({"k1.png": png(), "k1.jpg": png(), "k1.cls": b"0"}, "'k1' has .png, .jpg, .cls"),
        ({"k1.png": png(), "k1.cls": b"cat"}, "k1.cls has b'cat'"),
        ({"k1.png": png(), "k1.cls": b"-1"}, "k1.cls"),
        ({"k1.png": png(), "k1.cls": b""}, "k1.cls"),
        ({"k1.png": png(), "k1.cls": b"0", "k1.PNG": png()}, "'k1.PNG' is there twice"),
    ],
)
def test_a_sample_of_a_shard_that_is_not_whole_is_named(tmp_path, files, words):
    add_to_shard(tmp_path / "train-000000.tar", {"k0.png": png(), "k0.cls": b"0"})
    add_to_shard(tmp_path / "train-000001.tar", files)
    message = refusal(format="shards", root=tmp_path)
    assert "train-000001.tar" in message and words in message


def test_a_missing_shard_is_named_by_its_number(shards):
    (shards / "train-000002.tar").unlink()
    assert "number 2" in refusal(format="shards", root=shards)


def test_the_last_shards_or_samples_that_are_missing_are_reported(shards, tmp_path):
    last = max(shards.glob("train-*.tar"))
    count = len(list(shards.glob("train-*.tar")))
    whole = last.read_bytes()
    last.unlink()
    message = refusal(format="shards", root=shards)
    assert f"has {count - 1} shards of 'train'" in message and f"there are {count}" in message
    add_to_shard(last, {})
    assert "samples of 'train'" in refusal(format="shards", root=shards)
    last.unlink()
    (shards / "shards.json").unlink()  # as in a set that others made
    assert len(open_split(DataConfig(format="shards", root=str(shards)), "train")) < 17
    last.write_bytes(whole)
    for damaged in ("{", "[]", '{"train": 1}'):
        (shards / "shards.json").write_text(damaged)
        assert "shards.json" in refusal(format="shards", root=shards)


def test_shards_of_a_program_that_was_killed_are_incomplete(folder, tmp_path, monkeypatch):
    write_shard = scripts.data.shards.write_shard

    def killed(path, *more):
        if path.name == "train-000002.tar":
            raise KeyboardInterrupt
        write_shard(path, *more)

    monkeypatch.setattr(scripts.data.shards, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        make_shards(str(folder), tmp_path / "cut", ["train", "val"], samples=4)
    assert "has 2 shards of 'train'; by its shards.json there are 5" in refusal(format="shards", root=tmp_path / "cut")


def test_splits_can_be_added_to_shards(folder, tmp_path):
    for split in ("train", "val"):
        make_shards(str(folder), tmp_path / "both", [split], samples=4)
    assert [len(open_split(DataConfig(format="shards", root=str(tmp_path / "both")), s)) for s in ("train", "val")] == [
        17,
        13,
    ]


def test_a_truncated_shard_is_named(shards):
    path = shards / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:1500])
    assert str(path) in refusal(format="shards", root=shards)


def test_shards_without_a_sample(tmp_path):
    add_to_shard(tmp_path / "train-000000.tar", {})
    assert "no samples" in refusal(format="shards", root=tmp_path)
    add_to_shard(tmp_path / "train-000001.tar", {"ü/k.JPG": png(), "ü/k.cls": b" 1\n", "ü/k.json": b"{}", "n.txt": b""})
    add_to_shard(tmp_path / "train-000002.tar", {})
    images = open_split(DataConfig(format="shards", root=str(tmp_path)), "train")
    assert (len(images), images.classes, images.load(0)[1]) == (1, ["0", "1"], 1)
    assert images.describe(0).endswith("train-000001.tar:ü/k") and images.order(0, 0).tolist() == [0]
    (tmp_path / "train-000003.tar").write_bytes(b"")
    assert "train-000003.tar" in refusal(format="shards", root=tmp_path)


def test_classes_of_shards(tmp_path):
    add_to_shard(tmp_path / "train-0.tar", {"k.png": png(), "k.cls": b"1"})
    add_to_shard(tmp_path / "val-0.tar", {"k.png": png(), "k.cls": b"2"})
    data = DataConfig(format="shards", root=str(tmp_path))
    assert open_split(data, "train").classes == open_split(data, "val").classes == ["0", "1", "2"]
    data.num_classes = 10
    assert open_split(data, "train").classes == [str(k) for k in range(10)]
    data.num_classes = None
    (tmp_path / "classes.json").write_text(json.dumps(["chat noir", "猫"]))
    assert open_split(data, "train").classes == ["chat noir", "猫"]
    assert "is of class 2" in refusal("val", format="shards", root=tmp_path)
    (tmp_path / "classes.json").write_text('{"b": 2, "a": 0, "c": 1}')
    assert open_split(data, "train").classes == ["a", "c", "b"]
    (tmp_path / "classes.json").write_text('{"a": 1}')
    assert "classes.json" in refusal(format="shards", root=tmp_path)
    (tmp_path / "classes.txt").write_text("a b\nc\nd\n")
    assert open_split(data, "val").classes == ["a b", "c", "d"]
