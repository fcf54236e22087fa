"""Random misconfigurations: keys, groups, types, ranges and combinations. Each must end in an error without a
traceback, or run."""

from __future__ import annotations

import random
import runpy
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from scripts.kill_storm import SMALL
from scripts.storm.trials import Row, forked, is_kind
from train.config import TrainConfig  # noqa: F401  registers the schema
from train.jobs.settings import flatten
from train.jobs.sweep import CONFIGS

# So that what is valid is a run of seconds. They come first: what is wrong may replace them.
TINY = [*SMALL, "recipe.epochs=1", "recipe.temperature_epochs=0", "recipe.warmup_epochs=0", "data.train_images=32"]
VALUES = (
    "-1 0 1 2 3 0.5 1e-9 1e30 -0.1 nan inf null true [] [1,2] {a:1} abc '' 1/0 1/3 1/4 99999999999999999999 static auto "
    "/nowhere é 1,2 ${n} ${nothing}"
).split(" ")
ODD = (
    "n= =3 n=[ n==1 + ~n ++n=1/2 +n=1 +nothing=1 hydra.run.dir= --nothing recipe @recipe=digits recipe@x=digits "
    "n=${oc.env:NOTHING} hydra/launcher=slurm hydra/launcher=nothing -m --config-name=nothing evaluate=/nowhere "
    "start_from=/nowhere resume=never"
).split(" ")


def misconfigure(count: int, place: Path, seed: int = 0) -> Row:
    row, chance = Row("random settings"), random.Random(seed)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("train", TINY, return_hydra_config=True)
    choices = dict(composed.hydra.runtime.choices)
    plain: Any = OmegaConf.to_container(composed, resolve=False)
    plain.pop("hydra")
    keys = sorted(flatten(plain))
    groups = [name for name in choices if not name.startswith("hydra/")]
    for number in range(count):
        wrong = [word_of(chance, keys, groups) for _ in range(chance.choice([1, 1, 2, 3]))]
        folder = place / f"settings{number}"
        ended = forked(lambda words=(*TINY, f"hydra.run.dir={folder}", *wrong): train(words), seconds=25)  # type: ignore[misc]
        row.add(" ".join(wrong), is_kind(ended))
    return row


def word_of(chance: random.Random, keys: list[str], groups: list[str]) -> str:
    """One override, which may be wrong."""
    kind = chance.random()
    if kind < 0.6:
        return f"{chance.choice(keys)}={chance.choice(VALUES)}"
    if kind < 0.75:
        return f"{misspelt(chance, chance.choice(keys))}={chance.choice(VALUES)}"
    if kind < 0.9:
        return (
            f"{chance.choice(groups)}={chance.choice(['nothing', 'resnet19', 'digits', 'imagenet', 'null', '[a,b]'])}"
        )
    return chance.choice(ODD)


def misspelt(chance: random.Random, key: str) -> str:
    at = chance.randrange(len(key))
    return key[:at] + chance.choice(["", "x", key[at] * 2]) + key[at + 1 :]


def train(words: tuple[str, ...]) -> None:
    """`python -m train WORDS`, in this process."""
    sys.argv = ["train", *words]
    runpy.run_module("train", run_name="__main__", alter_sys=True)
