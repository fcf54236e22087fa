"""Names of run folders: that of MMDetection's file, and settings that differ from it and decide what a run learns or
how it is evaluated (`mask_rcnn_kw1x_resnet50_1x_coco+n-4x+train_cfg.max_epochs-1`)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from detection.compose import find, is_about_results, look_up, read, typed_settings
from detection.config import DetectionConfig
from kw.baselines.registry import BASELINES
from kw.config import KW, STATIC, format_budget
from train.jobs.names import differences, extended
from train.jobs.settings import flatten

OWN_SETTINGS = ("init", "start_from", "scratch", "data.classes", "data.on_error")  # that are shown


def run_name(config: DetectionConfig, composed: DictConfig) -> str:
    """The name of a run whose settings are valid.

    Args:
        composed: what Hydra composed, whose keys that are not ours are the file's.
    """
    file = read(find(config.config))
    typed = {key: value for key, value in typed_settings(composed).items() if is_about_results(key)}
    before: dict[str, Any] = {key: look_up(file, key, None) for key in typed}
    after = {**before, **typed}
    defaults, own = (flatten(asdict(one)) for one in (DetectionConfig(config.config), config))
    before |= {key: defaults[key] for key in OWN_SETTINGS}
    after |= {key: own[key] for key in OWN_SETTINGS}
    before["n"], before["dynamic"] = _method(file.model.backbone)
    after["n"] = before["n"] if config.n is None else _budget(config.n)
    after["dynamic"] = config.dynamic or before["dynamic"]
    if STATIC in (after["dynamic"], after["n"]) and before["n"] != STATIC:
        after["n"], after["dynamic"] = STATIC, before["dynamic"]
    elif after["dynamic"] in BASELINES and not BASELINES[after["dynamic"]].budget:
        after["n"] = before["n"]
    name = Path(config.config).stem if config.config.endswith(".py") else config.config
    return extended(name, differences(_lists(after), _lists(before)))


def _method(backbone: Any) -> tuple[str, str]:
    """n and method of the file's backbone. A method without a budget needs no n."""
    n, dynamic = backbone.get("n"), backbone.get("dynamic") or KW
    if n is None and dynamic in BASELINES and not BASELINES[dynamic].budget:
        n = 1
    return _budget(n), dynamic


def _budget(n: Any) -> str:
    return STATIC if n in (None, STATIC) else format_budget(n)


def _lists(value: Any) -> Any:
    """With lists in place of tuples, which the command line does not have."""
    if isinstance(value, dict):
        return {key: _lists(one) for key, one in value.items()}
    return [_lists(one) for one in value] if isinstance(value, list | tuple) else value
