"""Small sets of images in each format, and what a loader makes of them."""

import io
import tarfile

from PIL import Image

from scripts.data.shards import make_shards
from train.config import AugmentConfig, DataConfig, RecipeConfig
from train.data.batching import MicroBatches
from train.data.formats import open_split
from train.data.loader import Samples, train_loader
from train.data.transforms import train_transform

NAMES = {"chat noir": ["b.png", "a.JPG", "sous/dossier/ç.Png", "sous.d/z.jpeg"], "猫": ["ω.png", "x.y.png", "2.webp"]}
OF_FILES = ["folder", "tar", "shards"]  # formats that hold files of images; a fixture of each is in data/conftest.py
STRONG = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, random_erasing=0.5)


def make_tar(root, path, prefix="a/b"):
    with tarfile.open(path, "w") as archive:
        archive.add(root, arcname=prefix)
    return path


def holding(format_, root, tmp_path):
    if format_ == "tar":
        root = make_tar(root, tmp_path / "broken.tar")
    if format_ == "shards":
        make_shards(str(root), tmp_path / "broken", ["train", "val"], samples=4)
        root = tmp_path / "broken"
    return DataConfig(format=format_, root=str(root), image_size=16)


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


def loaded(samples, workers=0, world=1, steps=6, accumulation=1, start=0, repeats=1):
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
