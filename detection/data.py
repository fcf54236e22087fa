"""Data sets in COCO's format, checked before training starts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config

from train.jobs.errors import ConfigError, DataError


def datasets(cfg: Config, split: str) -> Iterator[Any]:
    """The data sets of a split that read annotation files, also inside data sets that wrap them."""
    loader = cfg.get(f"{split}_dataloader")
    found = [loader.dataset] if loader else []
    while found:
        dataset = found.pop()
        inner = dataset.get("dataset") or dataset.get("datasets")
        if inner:
            found += inner if isinstance(inner, list) else [inner]
        else:
            yield dataset


def annotation_file(dataset: Any) -> Path:
    return Path(dataset.get("data_root") or "") / dataset.ann_file


def class_names(dataset: Any) -> list[str]:
    """The classes that a data set is configured to have."""
    named = dataset.get("metainfo") or DATASETS.get(dataset.type).METAINFO
    return [named["classes"]] if isinstance(named["classes"], str) else list(named["classes"])


def read_annotations(path: Path) -> dict[str, Any]:
    """Raises DataError: the file does not exist, or is not an annotation file in COCO's format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"The annotation file {path} does not exist. data.root=PATH names the folder that contains "
            f"annotations/instances_train2017.json, train2017/, val2017/ ..."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"The annotation file {path} cannot be read: {error}") from None
    parts = ("images", "annotations", "categories")
    missing = [key for key in parts if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{path} is not an annotation file in COCO's format: it has no list of {', '.join(missing)}.")
    return content


def read_classes(cfg: Config) -> list[str]:
    """The classes of the training set's annotations, in the order of their ids."""
    content = read_annotations(annotation_file(next(datasets(cfg, "train"))))
    return [category["name"] for category in sorted(content["categories"], key=lambda category: category["id"])]


def set_classes(cfg: Config, classes: Sequence[str]) -> None:
    """Set the classes of all data sets, and their number in all heads."""
    for split in ("train", "val", "test"):
        for dataset in datasets(cfg, split):
            dataset.metainfo = {"classes": tuple(classes)}
    for head in heads(cfg.model):
        head["num_classes"] = len(classes)


def heads(model: Any) -> Iterator[dict[str, Any]]:
    """The parts of a detector's configuration that predict classes."""
    for key, part in model.items():
        for module in part if isinstance(part, list) else [part]:
            if isinstance(module, dict) and key != "backbone":
                if "num_classes" in module:
                    yield module
                yield from heads(module)


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Look for what would fail, or silently be left out, once training has begun.

    Raises:
        DataError: annotations or images are missing.
        ConfigError: the classes are not those of the annotations, or the heads predict another number of them.
    """
    for split in splits:
        for dataset in datasets(cfg, split):
            path, classes = annotation_file(dataset), class_names(dataset)
            content = read_annotations(path)
            _check_classes(path, classes, [category["name"] for category in content["categories"]])
            _check_images(path, content, Path(dataset.get("data_root") or "") / dataset.data_prefix.img)
            _check_annotations(path, content)
            for head in heads(cfg.model):
                if head["num_classes"] != len(classes):
                    raise ConfigError(
                        f"{head.get('type')}: num_classes={head['num_classes']}, but the {split} data have "
                        f"{len(classes)} classes. data.classes=data takes both from the annotations."
                    )


def _check_classes(path: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in there]
    unknown = [name for name in there if name not in wanted]
    if missing or unknown:
        raise ConfigError(
            f"The {len(wanted)} classes of the configuration and the {len(there)} of {path} differ: "
            f"{len(missing)} are not in the file ({_some(missing)}), {len(unknown)} are not in the configuration "
            f"({_some(unknown)}). data.classes=data takes those of the file."
        )


def _check_images(path: Path, content: dict[str, Any], folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"{path} describes images in {folder}, which does not exist.")
    there = {entry.name for entry in os.scandir(folder)}
    names = [image["file_name"] for image in content["images"]]
    missing = [name for name in names if name not in there and not (folder / name).is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(names)} images of {path} are not in {folder}: {_some(missing)}.")


def _check_annotations(path: Path, content: dict[str, Any]) -> None:
    if not content["annotations"]:
        raise DataError(f"{path} has no annotations.")
    for key, kind in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[kind]}
        stray = [str(entry["id"]) for entry in content["annotations"] if entry[key] not in known]
        if stray:
            raise DataError(
                f"{path}: the {key} of {len(stray)} annotations is not among the {kind}. Their ids: {_some(stray)}."
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"
