"""Prices of multiply-adds and memory, measured for each kind of device by `python -m scripts.bench.fit_prices`.

A table is a file `prices/KIND.json` ("cpu", "cuda_9.0", ...): where, when and by which command it was measured, and for
a forward pass and a training step the nanoseconds of each implementation's work (kw/compute/cost.py).
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, NamedTuple

import torch

Prices = dict[str, dict[str, float]]  # by implementation, and by what it does


class Table(NamedTuple):
    measured: dict[str, Any]  # for people to read
    forward: Prices
    step: Prices


def file_name(kind: str) -> str:
    return f"{kind.replace(' ', '_')}.json"


def load() -> dict[str, Table]:
    """All tables, by kind of device."""
    paths = [path for path in (files("kw.compute") / "prices").iterdir() if path.name.endswith(".json")]
    texts = {path.name.removesuffix(".json").replace("_", " "): path.read_text(encoding="utf-8") for path in paths}
    return {kind: Table(**json.loads(text)) for kind, text in texts.items()}


TABLES = load()  # when imported: torch.compile cannot look into files


def table(kind: str) -> Table | None:
    """The prices of this kind of device; None if none were measured."""
    return TABLES.get(kind)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def device_kind(device: torch.device) -> str:
    """ "cpu", "cuda 9.0" or "rocm 9.0" (by capability), "cuda" of a GPU that is not there (fake tensors), or the
    type."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    name = "cuda" if torch.version.hip is None else "rocm"
    return "{} {}.{}".format(name, *torch.cuda.get_device_capability(device))
