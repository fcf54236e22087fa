"""The rows of the paper's tables, from published.yaml: their figures, and their settings under our keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kw.config import KW, STATIC, format_budget

FILE = Path(__file__).with_name("published.yaml")
COSTS = FILE.with_name("costs.yaml")
CLASSIFICATION, DETECTION = "imagenet", "coco"
SCORES = {CLASSIFICATION: ("top1", "top5"), DETECTION: ("box_ap", "mask_ap")}
LABELS = {"top1": "top-1", "top5": "top-5", "box_ap": "box AP", "mask_ap": "mask AP"}
TRAINING_IMAGES = {CLASSIFICATION: 1_281_167, DETECTION: 117_266}  # COCO's images without objects are not trained on
DETECTION_EPOCHS = 12
IMAGENET, COCO = "ImageNet", "COCO, Mask R-CNN, 12 epochs"
# Rows of other methods are those of ODConv's release, which has a recipe for each backbone.
RIVALS, RIVALS_TITLE = "dynamic_convolution_baselines", "ImageNet, other dynamic convolutions (100 or 150 epochs)"
RIVALS_RECIPES = {"resnet18": ("sgd_100e", 100), "mobilenetv2_100": ("sgd_150e", 150)}

AUGMENT = ("color_jitter", "auto_augment", "interpolation", "random_erasing", "erasing_mode", "eval_resize",
           "eval_interpolation")  # fmt: skip
# Keys of published.yaml that have other names here.
NAMES = {"global_batch": "recipe.batch_size", "eval_crop": "data.image_size"}
NAMES |= {key: f"recipe.augment.{key}" for key in AUGMENT}
# What published.yaml says in words, as settings. `no_decay` and `per` need none: training does nothing else.
WORDS = {
    "transform": {
        "recipe.augment.interpolation": "bilinear",
        "recipe.augment.hflip": 0.5,
        "recipe.augment.scale": [0.08, 1.0],
        "recipe.augment.color_jitter": 0.0,
        "recipe.augment.auto_augment": None,
    },
    "no_decay": {},
    "per": {},
}


@dataclass(frozen=True, eq=False)
class Published:
    """One row. `scores` are percentages, None where nothing was published; `params` and `macs` were counted, None for
    detectors."""

    id: str
    task: str
    table: str  # its title
    backbone: str  # timm's name
    label: str  # the name in run folders
    dynamic: str  # the method: kw, static, or one of kw.baselines
    n: str
    params: int | None
    macs: int | None
    scores: dict[str, float | None]
    settings: dict[str, Any]  # {"recipe.lr": 0.004}; empty where none were released
    epochs: int
    gain: float | None = None  # top-1 over the static row, where nothing else was published

    @property
    def name(self) -> str:
        """The run folder's name."""
        if self.task == CLASSIFICATION:
            return self.id
        budget = "" if self.n == STATIC else f"kw{format_budget(self.n)}_"
        return f"mask_rcnn_{budget}{self.backbone}_1x_coco"

    @property
    def overrides(self) -> list[str]:
        """The overrides with which `python -m train` runs it, besides data.root."""
        if self.dynamic in (KW, STATIC):
            return [f"experiment={self.id}"]
        recipe, _ = RIVALS_RECIPES[self.backbone]
        return [f"backbone={self.label}", f"dynamic={self.dynamic}", f"n={self.n}", f"recipe={recipe}", "data=imagenet"]


def published() -> list[Published]:
    """All rows, in the order of the paper's tables."""
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    costs = yaml.safe_load(COSTS.read_text(encoding="utf-8"))
    labels = {row["backbone"]: row["id"] for row in content[CLASSIFICATION] if row["n"] is None}
    made = []
    for task in SCORES:
        for row in content[task]:
            recipe = content["recipes"].get(row.get("recipe"), {})
            settings = as_settings({**recipe, **(row.get("settings") or {})} if recipe else {})
            epochs = settings.get("recipe.epochs", 300) if task == CLASSIFICATION else DETECTION_EPOCHS
            scores = {key: row.get(key) for key in SCORES[task]}
            title = IMAGENET if task == CLASSIFICATION else COCO
            method = (KW, row["n"]) if row["n"] else (STATIC, STATIC)
            of = (task, title, row["backbone"], labels[row["backbone"]], *method)
            counted = [costs.get(row["id"], {}).get(key) for key in ("params", "macs")]
            made.append(Published(row["id"], *of, *counted, scores, settings, epochs, row.get("top1_gain")))
    return made + [_rival(row, costs[row["id"]]) for row in content[RIVALS] if row["id"] not in labels.values()]


def _rival(row: dict[str, Any], cost: dict[str, int]) -> Published:
    """A row of another method: its id contains the method and the budget, as in `resnet18_odconv4x`."""
    backbone, _, method = row["id"].rpartition("_")
    dynamic, n = method.rstrip("0123456789x"), re.sub(r"\D", "", method)
    scores = {key: row[key] for key in SCORES[CLASSIFICATION]}
    _, epochs = RIVALS_RECIPES[backbone]
    of = (CLASSIFICATION, RIVALS_TITLE, backbone, backbone, dynamic, n)
    return Published(row["id"], *of, cost["params"], cost["macs"], scores, {"recipe.epochs": epochs}, epochs)


def as_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Keys and values of published.yaml as settings: `{"global_batch": 256}` as `{"recipe.batch_size": 256}`."""
    made: dict[str, Any] = {}
    for key, value in recipe.items():
        made |= WORDS[key] if key in WORDS else {NAMES.get(key, f"recipe.{key}"): value}
    return made


def departures(config: dict[str, Any], row: Published) -> list[str]:
    """Where a run's settings (config.yaml) differ from the row's: `["recipe.epochs 90 (300)"]`, the row's in
    parentheses. Settings that config.yaml does not have are not compared."""
    found = []
    for key, value in {"data.train_images": None, **row.settings}.items():  # the row was trained on all images
        ours = _at(config, key)
        if ours is not MISSING and not _same(ours, value):
            found.append(f"{key} {ours} ({value})")
    own = config.get("kw")
    if isinstance(own, dict):  # settings that replace the published ones
        found += [f"kw.{key} {value}" for key, value in own.items() if value is not None]
    return found


MISSING = object()


def _at(config: Any, key: str) -> Any:
    for word in key.split("."):
        if not isinstance(config, dict) or word not in config:
            return MISSING
        config = config[word]
    return config


def _same(ours: Any, theirs: Any) -> bool:
    return bool(ours == theirs) or (not ours and not theirs)  # 0, 0.0 and null all mean: not at all
