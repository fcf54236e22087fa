"""Configurations in files and checkpoints, and how those of earlier versions are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from train.config.composition import validate
from train.config.schema import TrainConfig
from train.jobs.errors import warn
from train.jobs.settings import fixed_settings

VERSION = 2  # of the schema; a saved configuration without a version has 1
# For each version, what its keys became in the next one; None: the key is gone. A key that is renamed needs a new
# VERSION and a line here. Checkpoints of version 1 have "given", which nothing reads any more: without its line,
# loading one would warn of an unknown key.
MIGRATIONS: dict[int, dict[str, str | None]] = {
    1: {"given": None},
}


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """As nested dictionaries of plain values, with the version."""
    return {"version": VERSION, **asdict(config)}


def learnt_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what is learnt, as `{"recipe.lr": 0.1}`: a run is resumed only where these are equal."""
    return fixed_settings(asdict(config), TrainConfig)


def load_saved(plain: Mapping[str, Any]) -> TrainConfig:
    """A configuration that `to_plain` made in this or an earlier version. It warns of keys that are unknown here, and
    ignores them.

    Raises:
        ConfigError: a value is out of range, naming the key.
    """
    settings = _copy(plain)
    for version in range(settings.pop("version", 1), VERSION):
        for old, new in MIGRATIONS.get(version, {}).items():
            _move(settings, old, new)
    unknown = _drop_unknown(settings, TrainConfig)
    if unknown:
        warn(f"the saved configuration has keys that are unknown here, and are ignored: {', '.join(unknown)}.")
    return validate(settings)


def _copy(nested: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in nested.items()}


def _move(settings: dict[str, Any], old: str, new: str | None) -> None:
    """Give the value at a dotted key another key."""
    *above, last = old.split(".")
    place: Any = settings
    for part in above:
        place = place.get(part, {})
    if last not in place:
        return
    value = place.pop(last)
    if new is not None:
        *above, last = new.split(".")
        for part in above:
            settings = settings.setdefault(part, {})
        settings[last] = value


def _drop_unknown(settings: dict[str, Any], schema: Any, prefix: str = "") -> list[str]:
    """Remove the keys that a dataclass does not have; returns them, dotted."""
    known = {one.name: one.type for one in fields(schema)}
    unknown = [f"{prefix}{key}" for key in settings if key not in known]
    for key in list(settings):
        if key not in known:
            del settings[key]
        elif is_dataclass(known[key]) and isinstance(settings[key], dict):
            unknown += _drop_unknown(settings[key], known[key], f"{prefix}{key}.")
    return unknown
