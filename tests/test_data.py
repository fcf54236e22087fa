"""Images in folders, archives and shards: the same samples whatever holds them and however many processes read them,
every one once, and an error that names the file where one cannot be read."""

import gzip
import io
import itertools
import json
import os
import pickle
import random
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import save_image
from helpers.programs import finish, ranks
from helpers.selection import paired
from hydra import compose, initialize_config_dir
from PIL import Image

import scripts.data.shards
import train.data.tar
from scripts.data.shards import make_shards
from train.config import AugmentConfig, DataConfig, RecipeConfig, validate
from train.data.batching import MicroBatches
from train.data.formats import FORMATS, open_split
from train.data.images import BrokenImage
from train.data.loader import Samples, eval_loader, train_loader
from train.data.order import Key, epoch_order
from train.data.substitutes import Substitutes
from train.data.transforms import eval_transform, train_transform
from train.jobs.errors import ConfigError, DataError
from train.jobs.world import World
from train.trainer import Trainer

ROOT = Path(__file__).parents[1]
NAMES = {"chat noir": ["b.png", "a.JPG", "sous/dossier/ç.Png", "sous.d/z.jpeg"], "猫": ["ω.png", "x.y.png", "2.webp"]}
STRONG = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, random_erasing=0.5)


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


def make_tar(root, path, prefix="a/b"):
    with tarfile.open(path, "w") as archive:
        archive.add(root, arcname=prefix)
    return path


@pytest.fixture
def archive(folder, tmp_path):
    return make_tar(folder, tmp_path / "images.tar")


@pytest.fixture
def shards(folder, tmp_path):
    make_shards(str(folder), tmp_path / "shards", ["train", "val"], samples=4)
    return tmp_path / "shards"


OF_FILES = ["folder", "tar", "shards"]


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


def samples_of(data, split="train", seed=3, substitute=False):
    return Samples(open_split(data, split), train_transform(data, RecipeConfig(augment=STRONG)), seed, substitute)


def add_to_shard(path, files, mode="w"):
    with tarfile.open(path, mode) as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def png(value=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "png")
    return file.getvalue()


# ---- what there is to read ----


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
    assert "--samples" in (told := capsys.readouterr().out)
    assert scripts.data.shards.__doc__ in told  # with its line breaks
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


# ---- order and augmentation ----


def drawn(samples, workers=0, world=1, steps=6, accumulation=1, start=0, repeats=1):
    """All batches of all ranks, as {(step, turn, rank): (images, targets, indices)}."""
    found = {}
    for rank in range(world):
        batches = MicroBatches(
            len(samples.images), batch_size=8, accumulation=accumulation, steps=steps, seed=samples.seed, start=start,
            repeats=repeats, rank=rank, world=world, order=samples.images.order,
        )  # fmt: skip
        for k, batch in enumerate(train_loader(samples, batches, workers, pin=False)):
            found[start + k // accumulation, k % accumulation, rank] = batch
    return found


def flat(found):
    """Rows by step and index: micro-batch, turn and rank do not matter."""
    rows = {}
    for (step, _, _), (images, targets, indices) in found.items():
        for image, target, index in zip(images, targets.tolist(), indices.tolist(), strict=True):
            rows.setdefault((step, index), []).append((target, image.numpy().tobytes()))
    return {key: sorted(value) for key, value in rows.items()}


def test_samples_do_not_depend_on_workers_ranks_or_accumulation(data):
    samples = samples_of(data)
    alone = flat(drawn(samples))
    assert len(alone) == 48 == len({image for rows in alone.values() for _, image in rows})  # each augmented anew
    for workers, world, accumulation in ((1, 1, 1), (2, 1, 1), (0, 2, 1), (0, 4, 2), (2, 2, 2)):
        assert flat(drawn(samples, workers, world, accumulation=accumulation)) == alone, (workers, world)
    resumed = flat(drawn(samples, start=3))
    assert resumed == {key: rows for key, rows in alone.items() if key[0] >= 3}


def test_a_sample_is_a_function_of_its_key(data):
    samples = samples_of(data)
    keys = [Key(epoch, index, copy) for epoch in (0, 1) for index in range(6) for copy in (0, 1)]
    first = {key: samples[key].image for key in keys}
    random.Random(1).shuffle(keys)
    for key in keys:
        torch.rand(3), random.random(), np.random.rand()
        assert torch.equal(samples_of(data)[key].image, first[key]), key
    assert len({image.numpy().tobytes() for image in first.values()}) == len(keys)
    assert not torch.equal(samples_of(data, seed=4)[keys[0]].image, first[keys[0]])


def test_repeats_are_augmented_apart(data):
    rows = flat(drawn(samples_of(data), steps=2, repeats=2))
    assert len(rows) == 8 and all(len({image for _, image in copies}) == 2 for copies in rows.values())


def test_folder_and_archive_train_on_the_same_batches(folder, archive):
    found = [
        flat(drawn(samples_of(DataConfig(format=format_, root=str(root), image_size=16))))
        for format_, root in (("folder", folder), ("tar", archive))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("window", [1, 2, 3, 50])
def test_shards_are_read_a_few_at_a_time(shards, window):
    images = open_split(DataConfig(format="shards", root=str(shards), window=window), "train")
    orders = [images.order(seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] == images.order(0, 0).tolist()
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(order) == list(range(17))
        read = [shard for shard, _ in itertools.groupby(index // 4 for index in order)]
        at_once = [{index // 4 for index in order[k : k + 1]} for k in range(17)]
        last = {shard: max(k for k in range(17) if shard in at_once[k]) for shard in set(read)}
        begun = {shard: min(k for k in range(17) if shard in at_once[k]) for shard in set(read)}
        opened = [sum(begun[s] <= k <= last[s] for s in begun) for k in range(17)]
        assert max(opened) <= window


def test_an_epoch_of_shards_is_cut_as_that_of_a_folder(shards):
    order = open_split(DataConfig(format="shards", root=str(shards)), "train").order
    assert epoch_order(17, 5, 2, order=order).tolist() == order(5, 2).tolist()
    assert epoch_order(17, 5, 2, 3, order).tolist() == order(5, 2).repeat_interleave(3)[:17].tolist()


@pytest.mark.parametrize("world, workers", paired([1, 2, 3, 5], [0, 2]))
def test_evaluation_sees_every_sample_once(data, world, workers):
    samples = Samples(open_split(data, "val"), eval_transform(data, RecipeConfig()), 0)
    loaders = [eval_loader(samples, 4, workers, False, rank, world) for rank in range(world)]
    seen = [index for loader in loaders for batch in loader for index in batch.indices.tolist()]
    assert sorted(seen) == list(range(13))
    assert sum(len(loader) for loader in loaders) == sum(-(-len(range(rank, 13, world)) // 4) for rank in range(world))


# ---- broken images ----


@pytest.fixture
def broken(folder):
    """The folder, with three images in a row broken, and one by itself: cut off, empty, and of nonsense."""
    images = open_split(DataConfig(format="folder", root=str(folder)), "train")
    for index, content in ((4, images.read(4)[:60]), (5, b""), (6, b"nonsense"), (16, b"\x89PNG\r\n\x1a\n")):
        Path(images.describe(index)).write_bytes(content)
    return folder


def holding(format_, root, tmp_path):
    if format_ == "tar":
        root = make_tar(root, tmp_path / "broken.tar")
    if format_ == "shards":
        make_shards(str(root), tmp_path / "broken", ["train", "val"], samples=4)
        root = tmp_path / "broken"
    return DataConfig(format=format_, root=str(root), image_size=16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_run_by_its_name(broken_data, tmp_path, workers):
    samples = samples_of(broken_data)
    with pytest.raises(BrokenImage, match="cannot be read as an image"):
        [samples.images.load(k) for k in range(17)]
    with pytest.raises(DataError, match="cannot be read as an image") as stopped:
        drawn(samples, workers)
    assert str(tmp_path) in str(stopped.value) and "Traceback" not in str(stopped.value)
    evaluated = Samples(samples.images, eval_transform(DataConfig(image_size=16), RecipeConfig()), 0)
    with pytest.raises(DataError, match="cannot be read as an image"):
        list(eval_loader(evaluated, 4, workers, False))


def test_substitutes_are_the_same_for_all_and_listed_exactly(broken_data, tmp_path):
    data = broken_data
    images = open_split(data, "train")
    bad = []
    for k in range(17):
        try:
            images.load(k)
        except BrokenImage:
            bad.append(k)
    assert len(bad) == 4
    samples = samples_of(data, substitute=True)
    alone = flat(drawn(samples))
    for workers, world in ((2, 1), (0, 2), (1, 4)):
        assert flat(drawn(samples, workers, world)) == alone
    key = Key(1, bad[-1])
    stand_in = next(k % 17 for k in range(bad[-1], bad[-1] + 17) if k % 17 not in bad)
    assert samples[key].used == stand_in and samples[key].target == images.targets[stand_in]

    found = []
    for number, (workers, world) in enumerate(((0, 1), (2, 1), (1, 2))):
        run = tmp_path / f"run{number}"
        for rank in range(world):
            batches = MicroBatches(17, batch_size=8, accumulation=1, steps=6, seed=3, rank=rank, world=world,
                                   order=samples.images.order)  # fmt: skip
            loader = train_loader(samples, batches, workers, False, Substitutes(run, images, rank))
            for k, _ in enumerate(loader):
                if k == 2:  # killed, with others drawn ahead by workers; then again from the start
                    break
            list(loader)
        counts = [Substitutes(run, images, 0).count(epoch) for epoch in range(3)]
        lines = (run / "substituted.txt").read_text().splitlines()
        drawn_keys = [(step // 2, index) for step, index in alone if index in bad]
        assert [tuple(map(int, line.split("\t")[:2])) for line in lines] == sorted(drawn_keys)
        assert counts == [sum(epoch == e for e, _ in drawn_keys) for epoch in range(3)]
        for line in lines:
            _, index, copy, name, other = line.split("\t")
            assert (name, copy) == (images.describe(int(index)), "0")
            assert other in [images.describe(k) for k in range(17) if k not in bad]
        found.append(lines)
    assert found[0] == found[1] == found[2]


def test_nothing_but_broken_images_is_an_error_also_with_substitutes(folder):
    for path in (folder / "train").rglob("*.*"):
        path.is_file() and path.write_bytes(b"no")
    samples = samples_of(DataConfig(format="folder", root=str(folder), image_size=16), substitute=True)
    with pytest.raises(DataError, match="17 images in a row are broken"):
        samples[Key(0, 2)]


def test_a_file_that_is_gone_is_no_broken_image(folder):
    samples = samples_of(DataConfig(format="folder", root=str(folder), image_size=16), substitute=True)
    gone = Path(samples.images.describe(2))
    gone.unlink()
    with pytest.raises(DataError, match="No such file"):
        samples[Key(0, 2)]


def test_names_are_listed_on_a_line_each(tmp_path):
    save_image(tmp_path / "train" / "a" / "new\nline\t\u2028.png", 0)
    save_image(tmp_path / "train" / "a" / "z.png", 1)
    images = open_split(DataConfig(format="folder", root=str(tmp_path)), "train")
    Path(images.describe(0)).write_bytes(b"")
    samples = samples_of(DataConfig(format="folder", root=str(tmp_path), image_size=16), substitute=True)
    batches = MicroBatches(2, batch_size=2, accumulation=1, steps=2, seed=0)
    list(train_loader(samples, batches, 0, False, Substitutes(tmp_path, images)))
    assert Substitutes(tmp_path, images).count(1) == 1
    assert len((tmp_path / "substituted.txt").read_text().splitlines()) == 2


# ---- errors name what is wrong ----


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


# ---- settings ----


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return validate(compose("train", list(overrides)))


def test_the_groups_compose():
    assert config("data=archive", "data.root=x.tar").data.format == "tar"
    assert config("data=shards", "data.root=x", "data.window=3").data.window == 3
    cifar = config("data=cifar10", "data.root=x.tar")
    assert (cifar.data.image_size, cifar.data.num_classes, cifar.data.eval_split) == (32, 10, "test")
    assert (cifar.recipe.augment.hflip, cifar.recipe.augment.eval_resize) == (0.5, 224)


@pytest.mark.parametrize("override", ["data.on_error=skip", "data.window=0", "data.format=zip"])
def test_a_bad_value_is_refused_by_its_key(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        config(override)


def check_substituted(run):
    """Every epoch's line has the number of what is listed for it."""
    counts = [json.loads(line)["substituted"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    listed = (run / "substituted.txt").read_text().splitlines()
    assert len(counts) == 2 and min(counts) > 0
    assert counts == [sum(line.startswith(f"{epoch}\t") for line in listed) for epoch in (0, 1)]
    return listed


@pytest.mark.slow
def test_a_job_of_two_processes_lists_what_was_substituted_as_one_does(broken, tmp_path):
    words = run_words(holding("shards", broken, tmp_path))
    alone = tmp_path / "alone"
    alone.mkdir()
    Trainer(config(*words), alone, World(0, 1, torch.device("cpu"))).fit()
    for process in ranks(2, "train", *words, "runtime.workers=1", f"hydra.run.dir={tmp_path}/two"):
        finish(process)
    assert check_substituted(tmp_path / "two") == check_substituted(alone)


def test_a_run_lists_what_was_substituted(broken, tmp_path):
    words = run_words(holding("tar", broken, tmp_path))
    (tmp_path / "run").mkdir()
    Trainer(config(*words, "runtime.workers=2"), tmp_path / "run", World(0, 1, torch.device("cpu"))).fit()
    assert all("broken.tar" in line for line in check_substituted(tmp_path / "run"))


def run_words(data):
    """Two epochs of a narrow model on broken images."""
    group = {"tar": "archive"}.get(data.format, data.format)
    return [f"data={group}", f"data.root={data.root}", "data.image_size=16", "data.on_error=substitute",
            "recipe=digits", "recipe.epochs=2", "recipe.batch_size=8", "recipe.warmup_epochs=0",
            "backbone=resnet_digits", "backbone.kwargs.channels=[8,8,8,16]",
            "backbone.kwargs.stem_width=8"]  # fmt: skip
