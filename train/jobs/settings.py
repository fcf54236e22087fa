"""Settings that both programs have, and how a field says that it may change when a run is resumed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from train.jobs.errors import check, check_choice

T = TypeVar("T")
RESUMABLE = MappingProxyType({"resumable": True})  # metadata of a field


def resumable(default: T) -> T:
    """A dataclass field whose value may change when a run is resumed: it does not decide what the run learns.

    Fields without this mark must keep their value, so that a new field is safe by default.
    """
    made: T = field(default=default, metadata=RESUMABLE)
    return made


def fixed_settings(plain: Mapping[str, Any], schema: Any, prefix: str = "") -> dict[str, Any]:
    """The settings that a resumed run must have as before, as `{"recipe.lr": 0.1}`.

    Args:
        plain: nested dictionaries with the keys of `schema`.
        schema: a dataclass with types, not strings, as annotations.
    """
    found: dict[str, Any] = {}
    for one in fields(schema):
        value, key = plain[one.name], f"{prefix}{one.name}"
        if one.metadata.get("resumable"):
            continue
        if is_dataclass(one.type):
            found |= fixed_settings(value, one.type, f"{key}.")
        else:
            found |= flatten(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found


def flatten(nested: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """`{"recipe": {"lr": 1}}` as `{"recipe.lr": 1}`; empty dictionaries stay values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclass
class Runtime:
    """Where a run computes. Programs add fields to it."""

    device: str = resumable("auto")  # cuda where there is one, else cpu
    devices: int = resumable(1)  # processes on a node, one GPU each
    nodes: int = resumable(1)  # the same command runs on each
    rendezvous: str | None = resumable(None)  # host:port of the first of several nodes; SLURM sets it

    def __post_init__(self) -> None:
        check_choice("runtime.device", self.device, ("auto", "cpu", "cuda"))
        for key in ("devices", "nodes"):
            check(getattr(self, key) >= 1, f"runtime.{key}", getattr(self, key), "must be at least 1")


@dataclass
class LoggerConfig:
    """Services that show a run while it runs, besides the files of its folder."""

    services: list[str] = field(default_factory=list)  # tensorboard, wandb
    mode: str = "offline"  # of wandb: offline, to run `wandb sync` later, or online
    project: str = "kernelwarehouse"  # of wandb, as are entity and group
    entity: str | None = None
    group: str | None = None  # null: the jobs of a sweep are a group

    def __post_init__(self) -> None:
        for service in self.services:
            check_choice("logger.services", service, ("tensorboard", "wandb"))
        check_choice("logger.mode", self.mode, ("offline", "online"))
        check(self.project != "", "logger.project", self.project, "must not be empty")
