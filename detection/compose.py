"""MMDetection's configuration of a run: a file, with what the command line sets."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from omegaconf import DictConfig, OmegaConf

from detection.backbone import feature_channels
from detection.config import HOW_IT_RUNS, OWN, DetectionConfig
from detection.data import datasets, read_classes, set_classes
from kw.config import STATIC
from train.jobs.errors import ConfigError, check

CONFIGS = Path(__file__).parent / "configs"
SIZES = ("scale", "scales", "img_scale", "size", "crop_size")


def compose(config: DetectionConfig, composed: DictConfig) -> Config:
    """MMDetection's configuration: the file, with what the command line sets.

    Args:
        composed: what Hydra composed, whose keys that are not ours are the file's.

    Raises:
        ConfigError: there is no such file or key, or the file's backbone has no budget that could be set.
    """
    cfg = read(find(config.config))
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    given = dict(flatten({key: value for key, value in plain.items() if key not in OWN}))
    for key, value in given.items():
        if not any(key == word or key.startswith(f"{word}.") for word in config.added):
            check_known(cfg, key, value)
    cfg.merge_from_dict({key: with_tuples(value, key.rpartition(".")[2]) for key, value in given.items()})
    if config.data.root is not None:
        move_data(cfg, Path(config.data.root).expanduser())
    if config.data.classes == "data":
        set_classes(cfg, read_classes(cfg))
    for loader in (cfg[key] for key in cfg if key.endswith("_dataloader") and cfg[key]):
        if config.runtime.workers is not None:
            loader.num_workers = config.runtime.workers
        loader.persistent_workers = loader.num_workers > 0
    set_backbone(cfg, config, given)
    return cfg


def find(name: str) -> Path:
    """A configuration file by its name in detection/configs/ or its path."""
    known = {path.stem: path for path in CONFIGS.glob("*.py")}
    if name in known:
        return known[name]
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    near = difflib.get_close_matches(name, known, n=3)
    raise ConfigError(
        f"config={name!r}: no such file, nor one in detection/configs; near are {', '.join(near) or '-'}."
    )


def read(path: Path) -> Config:
    try:
        return Config.fromfile(path)
    except SyntaxError as error:
        raise ConfigError(f"config: {path} is no Python: {error}.") from None


def flatten(nested: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"train_cfg": {"max_epochs": 1}}` to `("train_cfg.max_epochs", 1)`."""
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def with_tuples(value: Any, key: str) -> Any:
    """The command line has no tuples, and mmcv takes no list for a size."""
    if isinstance(value, dict):
        return {name: with_tuples(one, name) for name, one in value.items()}
    if isinstance(value, list):
        values = [with_tuples(one, key) for one in value]
        return tuple(values) if key in SIZES and all(isinstance(one, int | float) for one in values) else values
    return value


def check_known(cfg: Config, key: str, value: Any) -> None:
    """Raises ConfigError if the file has no such key, or a number there and the value is none."""
    place: Any = cfg
    for part in key.split("."):
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, (dict, Config)) and part in place:
            place = place[part]
        else:
            known = list(place) if isinstance(place, (dict, Config)) else []
            near = difflib.get_close_matches(part, [str(name) for name in known], n=3)
            hint = f"; near are {', '.join(near)}" if near else ""
            raise ConfigError(f"{key}: the configuration has no {part!r} there{hint}. To add it: +{key}=...")
    check(not (isinstance(place, int | float) and isinstance(value, str)), key, value, f"the file has {place!r} there")


def move_data(cfg: Config, root: Path) -> None:
    """Read all data sets, and the evaluators' annotations, from `root`."""
    for split in ("train", "val", "test"):
        for dataset in datasets(cfg, split):
            dataset.data_root = str(root)
            evaluator = cfg.get(f"{split}_evaluator")
            for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
                if metric and metric.get("ann_file"):
                    metric.ann_file = str(root / dataset.ann_file)


def set_backbone(cfg: Config, config: DetectionConfig, given: dict[str, Any]) -> None:
    """Budget, checkpoint, and the channels that the neck takes."""
    backbone, neck = cfg.model.backbone, cfg.model.get("neck")
    if backbone.type != "KWBackbone":
        for key in ("n", "init", "scratch"):
            check(not getattr(config, key), key, getattr(config, key), f"not for a backbone {backbone.type}")
        return
    if config.n is not None:
        backbone.n = config.n
    if config.init is not None:
        backbone.init_cfg = {"type": "Pretrained", "checkpoint": config.init}
    if config.scratch:
        begin_from_scratch(cfg)
    if isinstance(neck, dict) and "model.neck.in_channels" not in given:
        indices = backbone.get("out_indices", (1, 2, 3, 4))
        neck["in_channels"] = feature_channels(backbone.name, indices, backbone.get("kwargs"))


def begin_from_scratch(cfg: Config) -> None:
    """Train what the files freeze, as it is as random as the rest, and warm the temperature up. Attentions' norms get
    no statistics: those of the few images of a device differ too much from what evaluation would take."""
    backbone = cfg.model.backbone
    backbone.frozen_stages, backbone.norm_eval = -1, "attention"
    backbone.pop("init_cfg", None)
    if backbone.get("n") not in (None, STATIC):
        cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": "TemperatureWarmup"}]


def learnt_settings(cfg: Config) -> str:
    """What decides what is learnt, as text: a run goes on only where it is the same."""
    kept = ("model", "train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "custom_hooks")
    plain = {key: value for key, value in flatten(cfg.to_dict()) if key.startswith(kept)}
    settings = {key: value for key, value in plain.items() if not HOW_IT_RUNS.fullmatch(key) and "init_cfg" not in key}
    return json.dumps(settings, indent=1, sort_keys=True, default=str)
