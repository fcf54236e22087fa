"""One run or the jobs of a sweep, as Hydra starts them.

Hydra itself creates one folder before it calls a job. By default that is the working directory or, for a sweep,
`hydra.sweep.dir`; the job then makes its run folder below `hydra.sweep.dir`. A user may also set `hydra.run.dir` or
`hydra.sweep.subdir`: that is then the run folder.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.jobs import outcomes, slots, states
from train.jobs.errors import ConfigError, check
from train.jobs.folder import make
from train.jobs.names import same, shorten
from train.jobs.settings import RESUMABLE

CONFIGS = Path(__file__).parents[2] / "configs"
GROUP = "logger.group"


def in_sweep() -> bool:
    """Whether this job is one of a sweep (`-m`)."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def check_launcher() -> None:
    """Raises ConfigError: a launcher is chosen, but without -m Hydra would ignore it and run the job here."""
    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    check(launcher == "basic" or in_sweep(), "hydra/launcher", launcher, "launches sweeps: add -m, also for one run")


def typed_keys() -> list[str]:
    """The keys of this job's overrides, groups included."""
    return [key_of(word) for word in HydraConfig.get().overrides.task]


def key_of(override: str) -> str:
    """`+recipe.lr=0.1` to `recipe.lr`."""
    return override.lstrip("+~").partition("=")[0]


def run_folder(*parts: str) -> Path:
    """The folder that the user chose for this job, or `parts` below hydra.sweep.dir. It need not exist."""
    job = HydraConfig.get()
    key = "hydra.sweep.subdir" if in_sweep() else "hydra.run.dir"
    if any(key_of(word) == key for word in job.overrides.hydra):
        return Path(job.runtime.output_dir)
    return Path(os.path.abspath(Path(job.runtime.cwd, job.sweep.dir)), *parts)


class Folders(Callback):
    """Hydra's callback (see `hydra.callbacks` in configs/): before Hydra creates a folder, make it ourselves, to end in
    one line if that fails, and to know which folders were there before. A sweep also gets a name for wandb."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Called before Hydra runs a single job."""
        outcomes.forget()
        _make_or_exit(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called before Hydra starts a sweep."""
        _make_or_exit(config.hydra.sweep.dir)
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        if launcher == "basic":
            outcomes.forget()
        else:
            sweep = outcomes.begin(Path(config.hydra.sweep.dir))
        if launcher == "local":
            slots.offer_gpus()
            states.watch(sweep)
        words = list(config.hydra.overrides.task)
        name = sweep_name(words, config.hydra.job.config_name)
        if name and not any(key_of(word) == GROUP for word in words):
            config.hydra.overrides.task.append(f"{GROUP}='{name}'")  # every job of the sweep gets it


def _make_or_exit(folder: str) -> None:
    try:
        make(Path(folder))
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")


def sweep_name(words: list[str], config_name: str) -> str:
    """What the jobs of a sweep have in common, the same when the sweep is resumed: what it sweeps over, then the other
    settings that differ from the defaults (`n-1,0.25+recipe.lr-0.1`).

    Args:
        words: the overrides of the command line.
        config_name: of the configuration that they change.
    """
    overrides = OverridesParser.create().parse_overrides(words)
    choices = hydra.compose(config_name, return_hydra_config=True).hydra.runtime.choices
    fixed = [one for one in overrides if not one.is_sweep_override()]
    fixed_groups = [str(one.input_line) for one in fixed if one.key_or_group in choices]
    defaults = hydra.compose(config_name, fixed_groups)

    swept = sorted(_readable(one) for one in overrides if one.is_sweep_override())
    return shorten("+".join([*swept, *sorted(_readable(one) for one in fixed if _counts(one, choices, defaults))]), 100)


def _counts(fixed: Override, choices: Mapping[str, str], defaults: DictConfig) -> bool:
    """Whether an override that is not swept over decides what the jobs learn, and differs from the default."""
    key, value = fixed.key_or_group, fixed.value()
    if is_resumable(defaults, key):
        return False
    if key in choices:
        return not same(value, choices[key])
    try:
        usual = OmegaConf.select(defaults, key)
    except OmegaConfBaseException:  # it refers to a setting that has no default, such as backbone.name
        usual = None
    return not same(value, usual)


def _readable(override: Override) -> str:
    values = re.sub(r"[^,\[\]]+", lambda part: _decimal(part[0]), str(override.input_line).partition("=")[2])
    return re.sub(r"[^\w.,+-]+", "-", f"{override.key_or_group}-{values}")


def _decimal(text: str) -> str:
    try:
        return f"{float(Fraction(text)):.12g}"
    except (ValueError, ZeroDivisionError):
        return text


def is_resumable(config: DictConfig, key: str) -> bool:
    """Whether the field of a dotted key, in a configuration with a schema, does not decide what is learnt."""
    node: Any = config
    for part in key.split("."):
        kind = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
        if kind is None or not is_dataclass(kind) or not isinstance(node, DictConfig):
            return False
        if any(one.name == part and dict(one.metadata) == dict(RESUMABLE) for one in fields(kind)):
            return True
        node = node.get(part)
    return False
