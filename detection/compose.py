"""MMDetection's configuration of a run: a file, with what the command line sets."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmengine.config import Config
from omegaconf import DictConfig, OmegaConf

from detection import feature_channels
from detection.config import OWN, DetectionConfig
from detection.data import datasets, read_classes, set_classes
from detection.errors import as_job_errors
from detection.plugin.backbone import has_temperature
from kw.baselines.registry import BASELINES, check_budget, startable
from kw.config import KW, STATIC
from train.jobs.errors import ConfigError, check
from train.jobs.settings import fixed_settings, flatten

CONFIGS = Path(__file__).parent / "configs"
SIZES = ("scale", "scales", "img_scale", "size", "crop_size")
# Parts of the file that decide what is learnt; and keys, by their beginnings and ends, that only say where and how. The
# file is MMDetection's and has no schema that could mark its fields, as train/config/schema.py does. A key that is not
# listed counts as one of results: at worst, a resume is refused that would have been harmless.
LEARNT = ("model", "train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "custom_hooks")
RUNNING = ("default_hooks", "visualizer", "log_")
LOADING = ("_dataloader.num_workers", "_dataloader.persistent_workers", "_dataloader.dataset.data_root")


@as_job_errors()
def compose(config: DetectionConfig, composed: DictConfig, added: Sequence[str] = ()) -> Config:
    """MMDetection's configuration: the file, with what the command line sets.

    Args:
        composed: what Hydra composed, whose keys that are not ours are the file's.
        added: keys that the file need not have.

    Raises:
        ConfigError: there is no such file or key, or the file's backbone has no budget that could be set.
    """
    cfg = read(find(config.config))
    typed = typed_settings(composed)
    for key, value in typed.items():
        if not any(key == word or key.startswith(f"{word}.") for word in added):
            check_known(cfg, key, value)
    cfg.merge_from_dict({key: with_tuples(value, key.rpartition(".")[2]) for key, value in typed.items()})
    if config.data.root is not None:
        move_data(cfg, Path(config.data.root).expanduser())
    if config.data.classes == "data":
        set_classes(cfg, read_classes(cfg))
    for loader in (cfg[key] for key in cfg if key.endswith("_dataloader") and cfg[key]):
        if config.runtime.workers is not None:
            loader.num_workers = config.runtime.workers
        loader.persistent_workers = loader.num_workers > 0
    set_backbone(cfg, config, typed)
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
        raise ConfigError(f"config: {path} is not valid Python: {error}.") from None


def typed_settings(composed: DictConfig) -> dict[str, Any]:
    """The keys of the file that the command line sets: `{"train_cfg.max_epochs": 1}`."""
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return flatten({key: value for key, value in plain.items() if key not in OWN})


def with_tuples(value: Any, key: str) -> Any:
    """Lists of sizes as tuples: the command line has no tuples, and mmcv refuses lists for sizes."""
    if isinstance(value, dict):
        return {name: with_tuples(one, name) for name, one in value.items()}
    if isinstance(value, list):
        values = [with_tuples(one, key) for one in value]
        return tuple(values) if key in SIZES and all(isinstance(one, int | float) for one in values) else values
    return value


def look_up(cfg: Config, key: str, missing: Any) -> Any:
    """The value at a dotted key (`param_scheduler.1.gamma`), or `missing`."""
    place: Any = cfg
    for part in key.split("."):
        if isinstance(place, list | tuple) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict | Config) and part in place:
            place = place[part]
        else:
            return missing
    return place


def check_known(cfg: Config, key: str, value: Any) -> None:
    """Raises ConfigError: the file does not have the key, or has a number there and the value is text; or the program
    does not use it."""
    if f"{key}.".startswith("default_hooks.checkpoint."):
        raise ConfigError(
            f"{key}: this program keeps checkpoints itself; runtime.checkpoint_steps and runtime.keep_best set how."
        )
    missing = object()
    parts = key.split(".")
    for depth in range(1, len(parts) + 1):
        found = look_up(cfg, ".".join(parts[:depth]), missing)
        if found is missing:
            above = look_up(cfg, ".".join(parts[: depth - 1]), missing) if depth > 1 else cfg
            known = [str(name) for name in above] if isinstance(above, dict | Config) else []
            near = difflib.get_close_matches(parts[depth - 1], known, n=3)
            hint = f"; near are {', '.join(near)}" if near else ""
            raise ConfigError(
                f"{key}: the configuration has no {parts[depth - 1]!r} there{hint}. To add it: +{key}=..."
            )
    check(not (isinstance(found, int | float) and isinstance(value, str)), key, value, f"the file has {found!r} there")


def move_data(cfg: Config, root: Path) -> None:
    """Read all data sets, and the evaluators' annotations, from `root`."""
    for split in ("train", "val", "test"):
        for dataset in datasets(cfg, split):
            dataset.data_root = str(root)
            evaluator = cfg.get(f"{split}_evaluator")
            for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
                if metric and metric.get("ann_file"):
                    metric.ann_file = str(root / dataset.ann_file)


def set_backbone(cfg: Config, config: DetectionConfig, typed: dict[str, Any]) -> None:
    """Method, budget, checkpoint, and the channels that the neck takes."""
    backbone, neck = cfg.model.backbone, cfg.model.get("neck")
    if backbone.type != "KWBackbone":
        for key in ("n", "dynamic", "init", "start_from", "scratch"):
            check(not getattr(config, key), key, getattr(config, key), f"not for a backbone {backbone.type}")
        return
    if config.n is not None:
        backbone.n = config.n
    if config.dynamic is not None:
        set_method(backbone, STATIC if config.n == STATIC else config.dynamic)
    if config.init is not None:
        backbone.init_cfg = {"type": "Pretrained", "checkpoint": config.init}
    if config.start_from is not None:
        method = backbone.get("dynamic") or KW
        rule = f"{method} has no place for static weights; {', '.join(startable())} have"
        check(method in startable(), "start_from", config.start_from, rule)
        backbone.init_cfg = {"type": "Pretrained", "checkpoint": config.start_from, "static": True}
    if config.scratch:
        begin_from_scratch(cfg)
    if isinstance(neck, dict) and "model.neck.in_channels" not in typed:
        indices = backbone.get("out_indices", (1, 2, 3, 4))
        neck["in_channels"] = feature_channels(backbone.name, indices, backbone.get("kwargs"))


def set_method(backbone: Any, dynamic: str) -> None:
    """Make the backbone one of another method, at the budget that it has."""
    if dynamic == STATIC:
        backbone.n = STATIC
        return
    backbone.dynamic = dynamic
    if dynamic in BASELINES and not BASELINES[dynamic].budget:
        backbone.n = "1"
        return
    n = backbone.get("n")
    check(n not in (None, STATIC), "dynamic", dynamic, "needs a budget, such as n=4: the file has none")
    if dynamic in BASELINES:
        try:
            check_budget(dynamic, n)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def begin_from_scratch(cfg: Config) -> None:
    """Train also what the files freeze, which is random without a checkpoint, and warm the temperature up. Attentions'
    norms do not track statistics: those of a device's few images differ too much from those that evaluation uses."""
    backbone = cfg.model.backbone
    backbone.frozen_stages, backbone.norm_eval = -1, "attention"
    backbone.pop("init_cfg", None)
    if has_temperature(backbone):
        cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": "TemperatureWarmup"}]


def is_about_results(key: str) -> bool:
    """Whether a key of the file decides what a run learns or how it is evaluated, not only where and how it runs."""
    return not key.startswith(RUNNING) and not key.endswith(LOADING)


def learnt_settings(config: DetectionConfig, cfg: Config) -> str:
    """The settings that decide what is learnt, as JSON: a run is resumed only where they are equal."""
    file = {key: value for key, value in flatten(cfg.to_dict()).items() if key.startswith(LEARNT)}
    kept = {key: value for key, value in file.items() if is_about_results(key) and "init_cfg" not in key}
    settings = {**fixed_settings(asdict(config), DetectionConfig), **kept}
    return json.dumps(settings, indent=1, sort_keys=True, default=str)
