"""Folders or a tar archive of images to WebDataset shards: python -m scripts.data.shards PATH FOLDER

Samples are shuffled once, so that every shard has images of many classes; the images' bytes stay as they are. The same
files and settings give the same shards, byte for byte. SPLIT.index.npz says what is in them: to read them from object
storage, upload all of FOLDER (docs/data.md).
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import torch

from scripts.arguments import argument_parser
from scripts.options import make_folder
from train.config import DataConfig
from train.data.formats import open_split
from train.data.images import Files
from train.data.order import order_generator
from train.data.remote_shards import make_index, write_index
from train.data.shards import SIZES, list_shards, read_sizes
from train.jobs.errors import ConfigError, RunError
from train.jobs.folder import temporary_for, write_atomically


def main() -> None:
    parser = argument_parser("data.shards", __doc__)
    parser.add_argument("source", help="a folder with SPLIT/<class>/*, or an uncompressed tar archive of such")
    parser.add_argument(
        "out", type=Path, help="folder for SPLIT-000000.tar ..., SPLIT.index.npz, classes.txt, shards.json"
    )
    parser.add_argument("--splits", nargs="+", default=["train", "val"], metavar="SPLIT", help="default: train val")
    parser.add_argument("--samples", type=int, default=2000, help="in a shard (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples (default: 0)")
    options = parser.parse_args()
    try:
        make_shards(options.source, options.out, options.splits, options.samples, options.seed)
    except RunError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def make_shards(source: str, out: Path, splits: list[str], samples: int = 2000, seed: int = 0) -> None:
    """Write classes.txt, the sizes of the splits in shards.json, and then the shards. In this order it is known what is
    missing if the program is killed.

    Raises:
        ConfigError: a split is not there, there are shards of it already, or splits differ in their classes.
    """
    if samples < 1:
        raise ConfigError(f"--samples={samples}: must be at least 1.")
    opened = {split: open_split(DataConfig(format="auto", root=source), split, "--splits") for split in splits}
    if not all(isinstance(images, Files) for images in opened.values()):
        raise ConfigError(f"{source} has no image files to put into shards: a folder or a tar archive of them would.")
    first = opened[splits[0]]
    for split, images in opened.items():
        if images.classes != first.classes:
            raise ConfigError(f"{source}: {split!r} has other classes than {splits[0]!r}.")
        if list_shards(out, split):
            raise ConfigError(f"{out} has shards of {split!r} already: name another folder, or move them away.")
    if bad := [name for name in first.classes if "\n" in name or "\r" in name]:
        raise ConfigError(f"{source}: the class {bad[0]!r} has a line break in its name: rename it.")
    make_folder(out)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in first.classes), encoding="utf-8")
    sizes = {split: {"shards": -(-len(images) // samples), "samples": len(images)} for split, images in opened.items()}
    write_atomically(out / SIZES, json.dumps({**read_sizes(out), **sizes}, indent=2) + "\n")
    for split, images in opened.items():
        assert isinstance(images, Files)
        order = torch.randperm(len(images), generator=order_generator(seed, 0)).tolist()
        for shard, begin in enumerate(range(0, len(order), samples)):
            write_shard(out / f"{split}-{shard:06d}.tar", images, order[begin : begin + samples], begin)
        write_index(out, split, make_index(list_shards(out, split)), first.classes)
        print(f"{split}: {len(order)} samples in {shard + 1} shards")


def write_shard(path: Path, images: Files, indices: list[int], begin: int) -> None:
    """Write a shard atomically. Keys are a number and the file's name without dots."""
    temporary = temporary_for(path)
    with tarfile.open(temporary, "w") as shard:
        for number, index in enumerate(indices, start=begin):
            stem, _, ending = images.describe(index).rpartition("/")[2].rpartition(".")
            key = f"{number:08d}_{re.sub(r'[.]', '_', stem)}"
            _add(shard, f"{key}.{ending.lower()}", images.read(index))
            _add(shard, f"{key}.cls", str(int(images.targets[index])).encode())
    temporary.replace(path)


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and owner, which would differ the next time
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
