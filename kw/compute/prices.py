"""Prices of multiply-adds and memory, measured for each kind of device by `python -m scripts.bench.fit_prices`.

A table is a file `price_tables/KIND.json` ("cpu", "cuda_9.0", ...). It records where, when and by which command it was
measured, and for forward passes and training steps the nanoseconds of each quantity of work (kw/compute/cost.py).
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, NamedTuple

import torch

Prices = dict[str, dict[str, float]]  # by implementation and quantity of work


class Table(NamedTuple):
    measured: dict[str, Any]  # for people to read
    forward: Prices
    step: Prices


def file_name(kind: str) -> str:
    return f"{kind.replace(' ', '_')}.json"


def load() -> dict[str, Table]:
    """All tables by kind of device."""
    paths = [path for path in (files("kw.compute") / "price_tables").iterdir() if path.name.endswith(".json")]
    texts = {path.name.removesuffix(".json").replace("_", " "): path.read_text(encoding="utf-8") for path in paths}
    return {kind: Table(**json.loads(text)) for kind, text in texts.items()}


TABLES = load()  # on import, because torch.compile cannot trace file access


def table(kind: str) -> Table | None:
    """The prices of this kind of device; None if it was not measured."""
    return TABLES.get(kind)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def device_kind(device: torch.device) -> str:
    """The kind of device: "cuda 9.0" or "rocm 9.0" (by capability); "cuda" for fake tensors without a GPU; else the
    device's type, such as "cpu"."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    name = "cuda" if torch.version.hip is None else "rocm"
    return "{} {}.{}".format(name, *torch.cuda.get_device_capability(device))
