"""CIFAR-10 as torchvision keeps it, a part of a data set's images, and the experiments on 32-pixel images."""

import hashlib
import json
import pickle
import struct
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers.images import save_image
from helpers.programs import ROOT
from helpers.training import NARROW, config
from torch import nn

import kw
from kw.baselines import BASELINES
from scripts.data.shards import make_shards
from scripts.report.published import departures, published
from scripts.report.rows import sections
from scripts.report.runs import find_runs
from train.config import DataConfig, to_plain
from train.data.cifar import FOLDER, MD5, META, SPLITS
from train.data.formats import open_split
from train.data.images import Part
from train.jobs.errors import ConfigError, DataError
from train.jobs.world import World
from train.model import build_model
from train.trainer import Trainer

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment/cifar10").glob("*.yaml"))
CPU = World(0, 1, torch.device("cpu"))


class Python2Pickler(pickle._Pickler):
    """Writes text as Python 2 wrote its strings, which the published files have: bytes, by opcodes of their own."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_text(self, text):
        raw = text.encode("latin1")
        short = len(raw) < 256
        self.write(
            (pickle.SHORT_BINSTRING + bytes([len(raw)])) if short else (pickle.BINSTRING + struct.pack("<i", len(raw)))
        )
        self.write(raw)

    def save_raw(self, raw):
        self.save_text(raw.decode("latin1"))

    dispatch[str], dispatch[bytes] = save_text, save_raw


def write(path, content):
    """As the published files were written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Python2Pickler(file, 2).dump(content)


def batch(size, seed):
    """Pixels in rows of 3,072, labels, names."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, 3072), dtype=np.uint8)
    labels = np.random.default_rng(seed).permutation([k % 10 for k in range(size)]).tolist()
    return {"data": pixels, "labels": labels, "filenames": [f"image_{seed}_{k}.png" for k in range(size)]}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """20 images a file, 100 to train and 20 to test, which count as published."""
    folder = tmp_path / "cifar" / FOLDER
    for seed, name in enumerate(name for names in SPLITS.values() for name in names):
        write(folder / name, batch(20, seed))
    write(folder / META, {"label_names": CLASSES, "num_vis": 3072})
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    for name, digest in sums.items():
        monkeypatch.setitem(MD5, name, digest)
    for key, split in (("train_list", "train"), ("test_list", "test")):  # torchvision's reader checks them too
        monkeypatch.setattr(torchvision.datasets.CIFAR10, key, [[name, sums[name]] for name in SPLITS[split]])
    monkeypatch.setitem(torchvision.datasets.CIFAR10.meta, "md5", sums[META])
    return tmp_path / "cifar"


def opened(root, split="train", format_="auto"):
    return open_split(DataConfig(format=format_, root=str(root)), split)


# ---- torchvision's layout ----


def test_the_published_sums_are_torchvisions():
    theirs = torchvision.datasets.CIFAR10
    assert {**dict(theirs.train_list), **dict(theirs.test_list), theirs.meta["filename"]: theirs.meta["md5"]} == MD5
    assert len(MD5) == 7 and {len(digest) for digest in MD5.values()} == {32}


@pytest.mark.parametrize("split", SPLITS)
def test_images_are_those_of_torchvisions_reader_in_its_order(root, split):
    theirs, ours = torchvision.datasets.CIFAR10(str(root), train=split == "train"), opened(root, split)
    assert ours.classes == theirs.classes == CLASSES and len(ours) == len(theirs) == 20 * len(SPLITS[split])
    for k in range(len(theirs)):
        image, target = ours.load(k)
        assert np.array_equal(image, theirs[k][0]) and target == theirs[k][1] and image.mode == "RGB"
    seeds = range(5) if split == "train" else [5]
    assert [ours.describe(k) for k in range(len(ours))] == [
        f"{root}/{FOLDER}/image_{seed}_{k}.png" for seed in seeds for k in range(20)
    ]


def test_the_folder_itself_will_do(root):
    plain, again = opened(root), opened(root / FOLDER)
    assert np.array_equal(again.pixels, plain.pixels) and again.targets.tolist() == plain.targets.tolist()
    assert again.names.tolist() == plain.names.tolist() and again.classes == CLASSES


def test_auto_still_takes_folders_of_images_for_folders(tmp_path):
    save_image(tmp_path / "test" / "cat" / "a.png", 0)
    assert opened(tmp_path, "test").classes == ["cat"]


class Opens:
    def __reduce__(self):
        return open, ("sprung", "w")


@pytest.mark.parametrize("name", ["data_batch_3", META])
def test_a_pickle_that_is_not_the_published_one_is_refused_by_name_and_not_run(root, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps({**batch(20, 2), "label_names": CLASSES, "more": Opens()})
    (root / FOLDER / name).write_bytes(evil)
    with pytest.raises(DataError, match=f"{name} is not CIFAR-10's file as published .* was not unpickled"):
        opened(root)
    assert not (tmp_path / "sprung").exists()
    monkeypatch.setitem(MD5, name, hashlib.md5(evil).hexdigest())
    opened(root)
    assert (tmp_path / "sprung").exists()  # the sum alone held it back: the trap works


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -3000])
def test_a_truncated_file_is_named(root, keep):
    path = root / FOLDER / "data_batch_4"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="data_batch_4 is not CIFAR-10's file as published"):
        opened(root)


def test_what_is_missing_is_named_with_the_way_out(root, tmp_path):
    (root / FOLDER / "data_batch_5").unlink()
    with pytest.raises(ConfigError, match="has no file data_batch_5"):
        opened(root)
    with pytest.raises(ConfigError, match=r"no split 'val'.*data\.eval_split: train or test"):
        opened(root, "val")
    with pytest.raises(ConfigError, match="no image files to put into shards"):
        make_shards(str(root), tmp_path / "shards", ["test"])
    (root / FOLDER / META).unlink()
    with pytest.raises(ConfigError, match=r"no file batches\.meta"):
        opened(root, "test")
    with pytest.raises(ConfigError, match=f"no folder {FOLDER} with CIFAR-10"):
        opened(tmp_path, format_="cifar10")
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.touch()
    for place in (tmp_path, archive):  # with what data=cifar10 says, format auto
        with pytest.raises(ConfigError, match=rf"`tar -xzf {archive} -C {tmp_path}`, then data\.root={tmp_path}\."):
            opened(place)


# ---- a part of the images ----


@pytest.mark.parametrize("count", [1, 7, 10, 50, 99, 100])
def test_a_part_has_so_many_different_images_with_all_classes_in_their_shares(root, count):
    whole = opened(root)
    part = Part(whole, count, "data.train_images")
    names = [part.describe(k) for k in range(count)]
    assert len(part) == len(set(names)) == count and part.classes == whole.classes
    shares = np.bincount([part.load(k)[1] for k in range(count)], minlength=10)
    assert shares.max() - shares.min() <= 1 and part.targets.tolist() == [part.load(k)[1] for k in range(count)]


def test_a_part_of_the_digits_keeps_shares_that_differ():
    whole = open_split(DataConfig(), "train")
    shares = np.bincount(whole.targets) / len(whole)
    found = np.bincount(Part(whole, 180, "").targets) / 180
    assert abs(found - shares).max() <= 1 / 180


def test_a_part_of_shards_is_read_in_their_order(tmp_path):
    for k in range(40):
        save_image(tmp_path / "images" / "train" / "ab"[k % 2] / f"{k}.png", k)
    make_shards(str(tmp_path / "images"), tmp_path / "shards", ["train"], samples=5)
    data = DataConfig(format="shards", root=str(tmp_path / "shards"), window=1)
    whole = open_split(data, "train")
    part = Part(whole, 13, "")
    order = part.order(3, 1).tolist()
    assert sorted(order) == list(range(13)) and order != part.order(3, 2).tolist()
    kept = {part.describe(k) for k in range(13)}
    names = [whole.describe(k) for k in whole.order(3, 1).tolist()]
    assert [part.describe(k) for k in order] == [name for name in names if name in kept]


def test_a_run_on_a_part_is_of_that_part_and_does_not_go_on_with_another(root, tmp_path):
    words = ["data=cifar10", f"data.root={root}", "recipe.epochs=1", "recipe.warmup_epochs=0", "recipe.batch_size=10"]
    words += ["backbone=resnet10_32", *NARROW[:1], "recipe.temperature_epochs=1"]
    done = Trainer(config(*words, "data.train_images=40"), tmp_path / "run", CPU).fit()
    assert done["eval_samples"] == 20 and done["data"] == "cifar10"
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["step"] == 4
    with pytest.raises(ConfigError, match=r"data\.train_images=40, now it is 50"):
        Trainer(config(*words, "data.train_images=50"), tmp_path / "run", CPU).resume()
    with pytest.raises(ConfigError, match=r"data\.train_images=101, but there are 100 images"):
        Trainer(config(*words, "data.train_images=101"), tmp_path / "more", CPU)
    with pytest.raises(ConfigError, match=r"data\.train_images=0: must be"):
        config(*words, "data.train_images=0")


def test_a_row_that_was_trained_on_a_part_is_not_as_published():
    row = next(row for row in published() if row.id == "resnet18_kw1x")
    composed = {
        count: config("experiment=resnet18_kw1x", "data.root=x", f"data.train_images={count}") for count in ("null", 9)
    }
    assert departures(to_plain(composed["null"]), row) == []
    assert departures(to_plain(composed[9]), row) == ["data.train_images 9 (None)"]


def test_runs_on_different_parts_are_different_rows(tmp_path):
    for count, seed in ((None, 0), (9, 1), (9, 2)):
        folder = tmp_path / f"{count}-{seed}"
        folder.mkdir()
        summary = {"name": "r", "backbone": "r", "n": "1", "data": "cifar10", "seed": seed, "top1": 50.0, "epochs": 1}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "config.yaml").write_text(json.dumps({"data": {"train_images": count}}))
    made, remarks = sections(find_runs([tmp_path])[0])
    assert not remarks and [(row.data, row.seeds) for row in made[-1].rows] == [("cifar10", 1), ("cifar10 (9)", 2)]


# ---- backbones and experiments ----


@pytest.mark.parametrize("dynamic", ["static", "kw", *BASELINES])
@pytest.mark.parametrize("group, stages", [("resnet18_32", (32, 16, 8, 4)), ("resnet10_32", (16, 8, 4, 2))])
def test_a_resnet_for_small_images_has_all_its_stages(group, stages, dynamic):
    made = config(f"backbone={group}", "n=1", f"dynamic={dynamic}", "data=cifar10", "data.root=x")
    with torch.device("meta"):
        model = build_model(made, 10)
    seen = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[2]))
    model.eval()(torch.zeros(1, 3, 32, 32, device="meta"))
    assert tuple(seen) == stages
    assert type(model.conv1) is nn.Conv2d and model.conv1.weight.shape[2:] == (3, 3)


@pytest.mark.parametrize("stride", [1, 2])
def test_features_of_a_small_stem_tell_their_reduction(stride):
    model = timm.create_model("kw_resnet18", n=1, features_only=True, stem_stride=stride).eval()
    shapes = [feature.shape[1:] for feature in model(torch.randn(1, 3, 32, 32))]
    stated = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert shapes == [(channels, 32 // reduction, 32 // reduction) for channels, reduction in stated]


@pytest.mark.parametrize("kwargs", [{"device": "meta"}, {"dtype": torch.float64}])
def test_a_small_stem_is_where_the_model_is(kwargs):
    model = timm.create_model("kw_resnet18", n="static", stem_stride=1, **kwargs)
    assert {p.device for p in model.parameters()} == {torch.device(kwargs.get("device", "cpu"))}
    assert {p.dtype for p in model.parameters()} == {kwargs.get("dtype", torch.float32)}


@pytest.mark.parametrize("stride, words", [(0, "at least 1"), (1.5, "at least 1"), ("1", "at least 1"), (1, "several")])
def test_a_stem_that_cannot_be_is_refused(stride, words):
    with pytest.raises(ValueError, match=rf"stem_stride={stride!r} .*{words}"):
        timm.create_model("kw_resnet18", stem_stride=stride, stem_type="deep")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_tells_its_command_and_parameters_and_trains_shrunk(name, root, tmp_path):
    word = f"experiment=cifar10/{name}"
    made = config(word, "data.root=x")
    method, budget = ("", "static") if "wide" in name else ("_dyconv4x", "4") if "caf" in name else ("_kw1x", "1")
    assert (made.data.name, made.n, made.name) == ("cifar10", budget, f"{made.backbone.label}{method}")
    with torch.device("meta"):
        params = kw.profile(build_model(made, 10), (3, 32, 32)).params
    text = (ROOT / f"configs/experiment/cifar10/{name}.yaml").read_text()
    assert f"# python -m train {word} data.root=PATH" in text and f"# Parameters: {params:,} (n = {budget})." in text
    shrunk = ["recipe.epochs=1", "recipe.warmup_epochs=0", "recipe.batch_size=10", "data.train_images=20"]
    narrow = ["++backbone.kwargs.channels=[8,8,8,16]", "++backbone.kwargs.layers=[1,1,1,1]"]
    trained = config(word, f"data.root={root}", *shrunk, *narrow)
    assert Trainer(trained, tmp_path / "run", CPU).fit()["epochs"] == 1


def test_image_files_and_torchvisions_layout_give_the_same_pixels(root, tmp_path):
    plain = opened(root, "test")
    for k in range(len(plain)):
        image, target = plain.load(k)
        path = tmp_path / "files" / "test" / CLASSES[target] / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    files = opened(tmp_path / "files", "test")
    assert files.classes == plain.classes

    def contents(images):
        return sorted((target, np.asarray(image).tobytes()) for image, target in map(images.load, range(len(images))))

    assert contents(files) == contents(plain)
