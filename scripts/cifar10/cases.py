"""The runs of docs/cifar10.md: what they are, and which run folders hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
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

    @property
    def title(self) -> str:
        return self.name + (", augmented" if self.protocol == AUGMENTED else "")


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
COSTS = ("params", "macs", "device", "commit")  # from summary.json, which a finished run has
COLUMNS = ("protocol", "network", "seed", *COSTS, "epoch", "train_top1", "top1", "top5", "seconds")
Line = dict[str, Any]
Runs = dict[tuple[Case, int], list[Line]]  # by case and seed, the lines of its epochs


def is_finished(case: Case, run: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run has all of its epochs, and what a finished run says of itself."""
    return bool(run) and int(run[-1]["epoch"]) == case.epochs and run[-1]["params"] != ""


def merge(earlier: Runs, found: Runs) -> tuple[Runs, list[str]]:
    """The runs found in folders, and of the earlier ones those that no folder has to its end; remarks on both.

    So a run stays in docs/cifar10.csv after its folder is gone. An earlier run that was not finished goes: it can be
    continued only where its folder is.
    """
    made, remarks = dict(found), list[str]()
    for (case, seed), old in earlier.items():
        if not is_finished(case, old):
            if (case, seed) not in made:
                remarks.append(f"{case.title}, seed {seed}: its {len(old)} epochs are left out, as no folder has them")
            continue
        new = made.get((case, seed), [])
        if not is_finished(case, new):
            made[case, seed] = old
            remarks.append(f"{case.title}, seed {seed}: kept from before, no folder has all of it")
        elif float(old[-1]["top1"]) != float(new[-1]["top1"]):
            was, now = old[-1]["top1"], new[-1]["top1"]
            remarks.append(f"{case.title}, seed {seed}: top-1 {now} in its folder, which counts, and {was} before")
    return made, remarks


def by_run(lines: Iterable[Mapping[str, Any]]) -> Runs:
    """The lines of docs/cifar10.csv by case and seed."""
    cases = {(case.protocol, case.name): case for case in CASES}
    found: Runs = {}
    for line in lines:
        case = cases.get((line["protocol"], line["network"]))
        if case is not None:
            found.setdefault((case, int(line["seed"])), []).append({key: line.get(key, "") for key in COLUMNS})
    return found


def in_order(runs: Runs) -> list[Line]:
    """All lines, case by case and seed by seed."""
    return [line for case in CASES for seed in SEEDS for line in runs.get((case, seed), [])]


def collect(roots: Iterable[Path]) -> tuple[Runs, list[str]]:
    """The runs below `roots`, a line of `COLUMNS` for each epoch, and remarks on folders that are left out.

    A folder is a case's run if everything that decides what it learns is the same, whatever it is called. Of several,
    the one with the most epochs counts.
    """
    wanted = _wanted()
    found: Runs = {}
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
    return found, remarks


@cache
def _wanted() -> dict[str, tuple[Case, int]]:
    found: dict[str, tuple[Case, int]] = {}
    for case in CASES:
        config = compose([*case.command.split(), "data.root=x"])
        found |= {_key(replace(config, seed=seed)): (case, seed) for seed in SEEDS}
    return found


def _key(config: TrainConfig) -> str:
    """What decides what a run learns. What the network is called does not."""
    settings = {key: value for key, value in learnt_settings(config).items() if key != "backbone.label"}
    return json.dumps(settings, sort_keys=True, default=str)


def _lines(folder: Path, case: Case, seed: int, batch: int) -> list[Line]:
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8") if (folder / "metrics.jsonl").exists() else ""
    made: list[Line] = []
    costs = {key: summary.get(key) or "" for key in COSTS}
    costs["commit"] = _short(costs["commit"])
    seconds, before = 0.0, 0
    for metric in map(json.loads, (line for line in text.splitlines(keepends=True) if line.endswith("\n"))):
        seconds += (metric["step"] - before) * batch / metric["images_per_second"]
        before = metric["step"]
        values = {key: round(metric[key], 4) for key in ("train_top1", "top1", "top5")}
        made.append({"protocol": case.protocol, "network": case.name, "seed": seed, **costs,
                     "epoch": metric["epoch"] + 1, **values, "seconds": round(seconds, 1)})  # fmt: skip
    return made


def _short(commit: str) -> str:
    """Seven digits, and "+" if files had been changed since."""
    return commit[:7] + commit[40:]
