"""The same samples whatever format holds them: folders, archives and shards."""

import os
import pickle
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.image_sets import NAMES, OF_FILES, add_to_shard, make_tar, png
from helpers.images import save_image
from helpers.training import config

import scripts.data.shards
import train.data.tar
from scripts.data.shards import make_shards
from train.config import DataConfig
from train.data.formats import FORMATS, open_split
from train.jobs.errors import ConfigError, DataError


def test_every_format_is_tested():
    """Formats of image files by the fixture `data`; digits in test_train.py, CIFAR-10 in test_cifar.py."""
    tested = {*OF_FILES, "digits", "cifar10"}
    for name in FORMATS.keys() - tested:
        pytest.fail(f"add {name!r} to OF_FILES, and a fixture of that name with the images of the fixture `folder`")
    assert tested == FORMATS.keys()


@pytest.mark.parametrize("prefix", ["", "a/b", "./x", "train"])
def test_an_archive_has_the_samples_of_the_folder_in_its_order(folder, tmp_path, prefix):
    path = make_tar(folder, tmp_path / "some.tar", prefix)
    for split in ("train", "val"):
        if prefix == split:
            continue  # train/train and train/val: the highest train is meant, which is the root here
        plain = open_split(DataConfig(format="folder", root=str(folder)), split)
        packed = open_split(DataConfig(format="tar", root=str(path)), split)
        assert packed.classes == plain.classes == sorted(NAMES)
        assert packed.targets.tolist() == plain.targets.tolist()
        for k in range(len(plain)):
            assert packed.read(k) == plain.read(k)
            assert packed.describe(k).endswith(plain.describe(k).removeprefix(f"{folder}/"))


def test_shards_have_the_samples_of_the_folder(folder, shards):
    for split, files in (("train", 17), ("val", 13)):
        plain = open_split(DataConfig(format="folder", root=str(folder)), split)
        packed = open_split(DataConfig(format="shards", root=str(shards)), split)
        assert packed.classes == plain.classes
        contents = [Counter((d.read(k), int(d.targets[k])) for k in range(len(d))) for d in (plain, packed)]
        assert contents[0] == contents[1] and len(packed) == files


def test_shards_are_the_same_from_folder_and_archive_and_again(folder, archive, shards, tmp_path):
    for k, source in enumerate((folder, archive)):
        make_shards(str(source), tmp_path / f"again{k}", ["train", "val"], samples=4)
        for path in sorted(shards.iterdir()):
            assert (tmp_path / f"again{k}" / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(ConfigError, match="already"):
        make_shards(str(folder), shards, ["train"])


def test_the_program_that_makes_shards_explains_itself(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_shards", "--help"])
    with pytest.raises(SystemExit):
        scripts.data.shards.main()
    assert "--samples" in (printed := capsys.readouterr().out)
    assert scripts.data.shards.__doc__ in printed  # with its line breaks
    for words, said in (
        (["--splits", "test"], "'test'.*--splits: a folder's name"),
        (["--samples", "0"], "--samples=0"),
    ):
        monkeypatch.setattr(sys, "argv", ["make_shards", str(folder), str(tmp_path / "out"), *words])
        with pytest.raises(SystemExit, match=said):
            scripts.data.shards.main()
    assert not (tmp_path / "out").exists()


def test_auto_takes_a_file_for_an_archive(folder, archive):
    for root in (folder, archive):
        assert len(open_split(DataConfig(format="auto", root=str(root)), "train")) == 17


def test_an_image_is_decoded_to_the_same_pixels_by_all(data, folder):
    images, plain = open_split(data, "val"), open_split(DataConfig(format="folder", root=str(folder)), "val")
    decoded = [Counter((d.load(k)[0].tobytes(), d.load(k)[1]) for k in range(len(d))) for d in (images, plain)]
    assert decoded[0] == decoded[1]


def test_a_data_set_can_be_pickled_for_processes_that_are_not_forked(data):
    images = open_split(data, "train")
    images.load(0)
    assert pickle.loads(pickle.dumps(images)).read(5) == images.read(5)


def test_an_index_is_kept_and_made_anew_when_the_archive_changes(archive, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train.data.tar, "CACHE_FROM", 1)
    data = DataConfig(format="tar", root=str(archive))
    first = open_split(data, "train")
    assert len(list((tmp_path / "cache" / "kernelwarehouse").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(train.data.tar, "members", lambda path: pytest.fail("read again"))
        assert open_split(data, "train").describe(3) == first.describe(3)
    save_image(folder / "train" / "猫" / "new.png", 99)
    archive.unlink()
    make_tar(folder, archive)
    assert len(open_split(data, "train")) == 18
    next((tmp_path / "cache" / "kernelwarehouse").iterdir()).write_bytes(b"PK damaged")
    assert len(open_split(data, "train")) == 18
    with pytest.raises(DataError, match="was changed after it was indexed"):
        first.load(0)


def test_many_shards_do_not_exhaust_the_descriptors(tmp_path):
    for k in range(100):
        add_to_shard(tmp_path / f"train-{k:06d}.tar", {"x.png": png(), "x.cls": b"0"})
    images = open_split(DataConfig(format="shards", root=str(tmp_path)), "train")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for k in range(100):
        images.read(k)
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 64


def test_the_groups_compose():
    assert config("data=archive", "data.root=x.tar").data.format == "tar"
    assert config("data=shards", "data.root=x", "data.window=3").data.window == 3
    remote = config("data=remote", 'data.root="pipe:aws s3 cp s3://b/{} -"').data
    assert (remote.format, remote.parts, remote.root) == ("shards", 8, "pipe:aws s3 cp s3://b/{} -")
    cifar = config("data=cifar10", "data.root=x.tar")
    assert (cifar.data.image_size, cifar.data.num_classes, cifar.data.eval_split) == (32, 10, "test")
    assert (cifar.recipe.augment.hflip, cifar.recipe.augment.eval_resize) == (0.5, 224)


@pytest.mark.parametrize("override", ["data.on_error=skip", "data.window=0", "data.format=zip"])
def test_a_bad_value_is_refused_by_its_key(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        config(override)
