"""Hydra's errors about the command line, in one line, with the nearest name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from train.jobs.sweep import CONFIGS


def advice(error: Exception, config_name: str) -> str:
    """What a user should read of an error with which Hydra refuses a command line.

    Args:
        config_name: of the configuration that the command line changes.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        there = ", ".join(error.options)
        return f"{group}={option}: there is no such option. There are {there}.{_hint(option, error.options)}"
    if unknown := re.match(r"Could not override '([^']+)'", str(error)):
        return f"{unknown[1]}: there is no such key.{_hint(unknown[1], list(keys(config_name)))}"
    if "Config group override must be" in str(error):  # Hydra does not say which
        return "A group of settings, such as recipe or data, must have the name of an option, not null."
    return one_line(error)


def keys(config_name: str) -> Iterator[str]:
    """Every dotted key of a configuration, and its groups."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose(config_name, return_hydra_config=True)
    yield from composed.hydra.runtime.choices
    yield from _dotted(OmegaConf.to_container(composed))


def _dotted(nested: Any, prefix: str = "") -> Iterator[str]:
    for key, value in nested.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _hint(name: str, known: Sequence[str]) -> str:
    """` Did you mean recipe.lr?`: the nearest names, or those that end with this one, such as recipe.lr for lr."""
    ends = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    found = {*ends, *difflib.get_close_matches(name, known, n=3)}
    near = sorted(found, key=lambda key: -difflib.SequenceMatcher(None, name, key).ratio())[:3]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def one_line(error: BaseException) -> str:
    """An error's lines and those of its cause, without OmegaConf's notes on types."""
    lines = [*str(error).splitlines(), *(str(error.__cause__).splitlines() if error.__cause__ else [])]
    kept = [line.strip() for line in lines if not re.match(r"\s*(full_key|object_type|reference_type|See https)", line)]
    text = ": ".join(dict.fromkeys(line for line in kept if line))
    return f"{text}.".replace(".:", ".").replace("..", ".")
