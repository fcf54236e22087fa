"""The runs of docs/cifar10.md: what they are, and which run folders hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from train.config import TrainConfig, compose, learnt_settings, load_saved
from train.jobs.errors import ConfigError

SEEDS = (0, 1, 2)
ORDER, AUGMENTED = "order", "order_augmented"  # experiments; each compares with its own static network


@dataclass(frozen=True)
class Case:
    """A network trained by one of the two protocols, with each of `SEEDS`.

    Args:
        large: the name of the static network with as many parameters, to compare with; or None.
    """

    name: str
    protocol: str
    command: str  # overrides of `python -m train`
    epochs: int
    large: str | None = None


CASES = (
    Case("static", ORDER, "experiment=cifar10/order n=static", 16),
    Case("static, as large as n = 1", ORDER, "experiment=cifar10/order_wide1x", 16),
    Case("static, as large as n = 4", ORDER, "experiment=cifar10/order_wide4x", 16),
    Case("KernelWarehouse, n = 1/2", ORDER, "experiment=cifar10/order n=1/2", 16),
    Case("KernelWarehouse, n = 1", ORDER, "experiment=cifar10/order n=1", 16, "static, as large as n = 1"),
    Case("KernelWarehouse, n = 4", ORDER, "experiment=cifar10/order n=4", 16, "static, as large as n = 4"),
    Case("DY-Conv, n = 4", ORDER, "experiment=cifar10/order dynamic=dyconv n=4", 16),
    Case("ODConv, n = 4", ORDER, "experiment=cifar10/order dynamic=odconv n=4", 16),
    Case("static", AUGMENTED, "experiment=cifar10/order_augmented n=static", 24),
    Case("KernelWarehouse, n = 1", AUGMENTED, "experiment=cifar10/order_augmented n=1", 24),
    Case("KernelWarehouse, n = 4", AUGMENTED, "experiment=cifar10/order_augmented n=4", 24),
)
COLUMNS = ("protocol", "network", "seed", "params", "macs", "device", "epoch", "train_top1", "top1", "top5", "seconds")
Line = dict[str, Any]


def collect(roots: Iterable[Path]) -> tuple[list[Line], list[str]]:
    """A line of `COLUMNS` for each epoch of each case and seed, and remarks on folders that are left out.

    A folder is a case's run if everything that decides what it learns is the same, whatever it is called. Of several,
    the one with the most epochs counts.
    """
    wanted = {}
    for case in CASES:
        config = compose([*case.command.split(), "data.root=x"])
        wanted |= {_key(replace(config, seed=seed)): (case, seed) for seed in SEEDS}
    found: dict[tuple[Case, int], list[Line]] = {}
    remarks = []
    for path in sorted({path for root in roots for path in root.rglob("config.yaml")}):
        try:
            config = load_saved(yaml.safe_load(path.read_text(encoding="utf-8")))
            key = _key(config)
            if key not in wanted:
                continue
            lines = _lines(path.parent, *wanted[key], config.recipe.batch_size)
        except (ConfigError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            remarks.append(f"{path.parent}: left out ({type(error).__name__}: {str(error).splitlines()[0]})")
            continue
        if len(lines) > len(found.get(wanted[key], [])):
            found[wanted[key]] = lines
    return [line for one in wanted.values() for line in found.get(one, [])], remarks


def _key(config: TrainConfig) -> str:
    """What decides what a run learns. What the network is called does not."""
    settings = {key: value for key, value in learnt_settings(config).items() if key != "backbone.label"}
    return json.dumps(settings, sort_keys=True, default=str)


def _lines(folder: Path, case: Case, seed: int, batch: int) -> list[Line]:
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8") if (folder / "metrics.jsonl").exists() else ""
    made: list[Line] = []
    seconds, before = 0.0, 0
    for metric in map(json.loads, (line for line in text.splitlines(keepends=True) if line.endswith("\n"))):
        seconds += (metric["step"] - before) * batch / metric["images_per_second"]
        before = metric["step"]
        values = {key: round(metric[key], 4) for key in ("train_top1", "top1", "top5")}
        costs = {key: summary.get(key, "") for key in ("params", "macs", "device")}
        made.append({"protocol": case.protocol, "network": case.name, "seed": seed, **costs,
                     "epoch": metric["epoch"] + 1, **values, "seconds": round(seconds, 1)})  # fmt: skip
    return made
