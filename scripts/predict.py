"""What a model folder says of images: the five most likely classes of each, with their shares, and a table.

    python -m scripts.predict model=FOLDER images=cat.jpg
    python -m scripts.predict model=FOLDER images=[cat.jpg,dog.jpg] out=report/cats.csv
    python -m scripts.predict model=FOLDER images=PICTURES batch=16

model    a folder of `python -m scripts.export` or `kw.save`; it has all that is needed
images   a file, several in brackets with commas, or a folder, which is searched with those in it
batch    images at a time
out      the table to write: a line for each image, with classes and shares
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import kw
from scripts.options import one_line_errors, parse
from scripts.pictures import SUFFIXES, pictures_in, read_picture
from train.jobs.errors import CheckpointError, ConfigError, check, writing

TOP = 5


@dataclass
class Options:
    """The command's own keys."""

    model: str = ""
    images: Any = ""
    batch: int = 8
    out: str = "report/predictions.csv"

    def __post_init__(self) -> None:
        check(bool(self.model), "model", self.model, "must be a model folder")
        check(bool(self.images), "images", self.images, "must be a picture, several in brackets, or a folder of them")
        check(self.batch >= 1, "batch", self.batch, "must be at least 1")


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of a picture, most likely first, with their shares of 1."""

    path: Path
    shares: dict[str, float] = field(default_factory=dict)


def main(words: list[str]) -> None:
    with one_line_errors():
        options, others = parse(Options, words, __doc__)
        if others:
            raise ConfigError(f"{others[0]}: this command has model, images, batch and out.")
        paths = find(options.images)
        try:
            model = kw.load(options.model)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        predictions = predict(model, paths, options.batch)
        out = Path(options.out).expanduser()
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            write(predictions, out)
    width = max(len(str(path)) for path in paths)
    for one in predictions:
        shares = "  ".join(f"{name} {100 * share:.1f}%" for name, share in one.shares.items())
        print(f"{one.path!s:<{width}}  {shares}")
    print(f"Written to {out}")


def find(images: Any) -> list[Path]:
    """The pictures that `images` names.

    Raises:
        ConfigError: there is no such file, or no picture in the folder.
    """
    paths: list[Path] = []
    for text in images if isinstance(images, (list, tuple)) else [images]:
        path = Path(str(text)).expanduser()
        if not path.exists():
            raise ConfigError(f"images={path}: there is no such file or folder.")
        folders = [path, *sorted(inner for inner in path.rglob("*") if inner.is_dir())] if path.is_dir() else []
        found = [picture for folder in folders for picture in pictures_in(folder)] if folders else [path]
        if not found:
            raise ConfigError(f"images={path}: no images there ({', '.join(sorted(SUFFIXES))}).")
        paths += found
    return paths


@torch.inference_mode()
def predict(model: nn.Module, paths: list[Path], batch: int) -> list[Prediction]:
    """The most likely classes of each picture."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    cfg: Any = model.pretrained_cfg
    names = cfg["label_names"] or [str(k) for k in range(cfg["num_classes"])]
    found = []
    for first in range(0, len(paths), batch):
        some = paths[first : first + batch]
        shares = model(torch.stack([transform(read_picture(path)) for path in some])).float().softmax(dim=1)
        best = shares.topk(min(TOP, len(names)), dim=1)
        for path, values, classes in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
            found.append(Prediction(path, {names[k]: value for k, value in zip(classes, values, strict=True)}))
    return found


def write(predictions: list[Prediction], path: Path) -> None:
    """A table: image, class1, share1, and so on."""
    most = max(len(one.shares) for one in predictions)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", *(f"{key}{k + 1}" for k in range(most) for key in ("class", "share"))])
        for one in predictions:
            table.writerow([one.path, *(cell for name, share in one.shares.items() for cell in (name, f"{share:.6f}"))])


if __name__ == "__main__":
    main(sys.argv[1:])
