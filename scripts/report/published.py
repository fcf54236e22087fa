"""The rows of the paper's tables, from published.yaml: their figures, and their settings under our keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kw.config import KW, STATIC, format_budget

FILE = Path(__file__).with_name("published.yaml")
COSTS = FILE.with_name("costs.yaml")
EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiment"
CLASSIFICATION, DETECTION = "imagenet", "coco"
SCORES = {CLASSIFICATION: ("top1", "top5"), DETECTION: ("box_ap", "mask_ap")}
LABELS = {"top1": "top-1", "top5": "top-5", "box_ap": "box AP", "mask_ap": "mask AP"}
TRAINING_IMAGES = {CLASSIFICATION: 1_281_167, DETECTION: 117_266}  # COCO's images without objects are not trained on
DETECTION_EPOCHS = 12
IMAGENET, COCO = "ImageNet", "COCO, Mask R-CNN, 12 epochs"
RELEASE = "the KernelWarehouse release"
HANDS = {1: "first hand", 2: "second hand"}
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


@dataclass(frozen=True)
class Table:
    """One table: its title, where its figures stand, whether their authors say so themselves (hand 1) or others quote
    them (hand 2), remarks, and ids of rows of other tables that are compared with its rows."""

    title: str
    source: str = RELEASE
    hand: int = 1
    remarks: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Published:
    """One row. `scores` are percentages, None where nothing was published; `params` and `macs` were counted, None for
    detectors."""

    id: str
    task: str
    table: Table
    backbone: str  # timm's name
    label: str  # the name in run folders
    dynamic: str  # the method: kw, static, one of kw.baselines, or one that this project does not have
    n: str
    params: int | None
    macs: int | None
    scores: dict[str, float | None]
    settings: dict[str, Any]  # {"recipe.lr": 0.004}; empty where none were released
    epochs: int
    gain: float | None = None  # top-1 over the static row, where nothing else was published
    hand: int = 1
    has_code: bool = True
    stated: float | None = None  # parameters as published, in millions

    @property
    def name(self) -> str:
        """The run folder's name."""
        if self.task == CLASSIFICATION or self.id.endswith("_coco"):
            return self.id
        budget = "" if self.n == STATIC else f"kw{format_budget(self.n)}_"
        return f"mask_rcnn_{budget}{self.backbone}_1x_coco"

    @property
    def overrides(self) -> list[str]:
        """The overrides with which `python -m train` runs it, besides data.root."""
        folder = "" if (EXPERIMENTS / f"{self.id}.yaml").exists() else "rivals/"
        return [f"experiment={folder}{self.id}"]


def published() -> list[Published]:
    """All rows, in the order of the tables: the paper's, then those of `groups`."""
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    costs = yaml.safe_load(COSTS.read_text(encoding="utf-8"))
    labels = {row["backbone"]: row["id"] for row in content[CLASSIFICATION] if row["n"] is None}
    tables = {CLASSIFICATION: Table(IMAGENET), DETECTION: Table(COCO, remarks=_coco_remarks(content))}
    made = []
    for task, table in tables.items():
        for row in content[task]:
            recipe = content["recipes"].get(row.get("recipe"), {})
            settings = as_settings({**recipe, **(row.get("settings") or {})} if recipe else {})
            epochs = settings.get("recipe.epochs", 300) if task == CLASSIFICATION else DETECTION_EPOCHS
            scores = {key: row.get(key) for key in SCORES[task]}
            method = (KW, row["n"]) if row["n"] else (STATIC, STATIC)
            of = (task, table, row["backbone"], labels[row["backbone"]], *method)
            counted = [costs.get(row["id"], {}).get(key) for key in ("params", "macs")]
            made.append(Published(row["id"], *of, *counted, scores, settings, epochs, row.get("top1_gain")))
    for group in content["groups"]:
        remarks = (*_speeds(group.get("speed")), *group.get("remarks", ()))
        table = Table(group["title"], group["source"], group["hand"], remarks, tuple(group.get("beside", ())))
        made += [_of_group(row, group, table, content["recipes"], costs) for row in group["rows"]]
    return made


def _of_group(row: dict[str, Any], group: dict[str, Any], table: Table, recipes: Any, costs: Any) -> Published:
    task, dynamic = group["task"], row["dynamic"]
    recipe = recipes[row.get("recipe", group["recipe"])] if task == CLASSIFICATION else {}
    settings = as_settings({key: recipe[key] for key in ("epochs", "global_batch", "optimizer") if key in recipe})
    n = STATIC if dynamic == STATIC else str(row.get("n", 1))
    label = row["id"].partition(f"_{dynamic}")[0]
    cost, has_code = costs.get(row["id"].replace("_100e", ""), {}), row.get("code") != "none"
    params = cost.get("params") if has_code or "params_m" not in row else round(1e6 * row["params_m"])
    return Published(
        row["id"], task, table, row["backbone"], label, dynamic, n, params, cost.get("macs"),
        {key: row.get(key) for key in SCORES[task]}, settings, settings.get("recipe.epochs", DETECTION_EPOCHS),
        hand=row.get("hand", group["hand"]), has_code=has_code, stated=row.get("params_m"),
    )  # fmt: skip


def _coco_remarks(content: dict[str, Any]) -> tuple[str, ...]:
    """What the table has no columns for."""
    columns = content["coco_columns"]
    made = []
    for row in columns["rows"]:
        parts = (
            f"{kind} {', '.join(f'{key} {value}' for key, value in row[kind].items())}" for kind in ("box", "mask")
        )
        made.append(f"{row['id']}: {'; '.join(parts)} ({columns['source']}; {HANDS[columns['hand']]}).")
    return (*made, *content["oddities"][DETECTION])


def _speeds(speed: dict[str, Any] | None) -> tuple[str, ...]:
    if speed is None:
        return ()
    rows = (f"{row['id']} {row['images_per_second']:,.0f} images/s, {row['peak_mb']:,.0f} MB" for row in speed["rows"])
    source = f"{speed['source']}; {HANDS[speed['hand']]}"
    return (f"Published speed of evaluation, batch 128, on a GPU that is not named ({source}): {'; '.join(rows)}.",)


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
