"""The same images in a folder, an archive and shards."""

import itertools
from pathlib import Path

import pytest
from helpers.image_sets import NAMES, OF_FILES, make_tar
from helpers.images import save_image

from scripts.data.shards import make_shards
from train.config import DataConfig
from train.data.formats import open_split


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Two splits of two classes: 17 images to train, 13 to evaluate, beside files that are none."""
    root = tmp_path / "images"
    seeds = itertools.count()
    for split, more in (("train", 10), ("val", 6)):
        for name, files in NAMES.items():
            for file in files:
                save_image(root / split / name / file, next(seeds))
        for k in range(more):
            save_image(root / split / "猫" / f"more{k}.png", next(seeds))
        (root / split / "猫" / "notes.txt").write_text("no image")
    (root / "README").write_text("neither")
    return root


@pytest.fixture
def archive(folder, tmp_path):
    return make_tar(folder, tmp_path / "images.tar")


@pytest.fixture
def shards(folder, tmp_path):
    make_shards(str(folder), tmp_path / "shards", ["train", "val"], samples=4)
    return tmp_path / "shards"


def data_of(request):
    holder = request.getfixturevalue({"tar": "archive"}.get(request.param, request.param))
    return DataConfig(format=request.param, root=str(holder), image_size=16, window=2)


@pytest.fixture(params=OF_FILES)
def data(request):
    """The same images in each format that holds files of images."""
    return data_of(request)


@pytest.fixture(params=OF_FILES)
def broken_data(broken, request):
    """`data` with broken images: `broken` breaks them before another format is made of the folder."""
    return data_of(request)


@pytest.fixture
def broken(folder):
    """The folder, with three images in a row broken, and one by itself: cut off, empty, and of nonsense."""
    images = open_split(DataConfig(format="folder", root=str(folder)), "train")
    for index, content in ((4, images.read(4)[:60]), (5, b""), (6, b"nonsense"), (16, b"\x89PNG\r\n\x1a\n")):
        Path(images.describe(index)).write_bytes(content)
    return folder
