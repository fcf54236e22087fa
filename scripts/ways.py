"""Which way each dynamic layer of a backbone takes to compute, and what each way would cost.

    python -m scripts.ways resnet18 4                       what the cost model expects, at batch 16 and 224 pixels
    python -m scripts.ways resnet18 4 --batch 1 --measure   beside it what was measured

Layers of the same shape that draw from the same warehouse are one row. A way with many times the plain one's
multiply-adds is not measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kw
from kw.layers import KWLayer
from kw.ways.cost import cheapest, costs, work
from kw.ways.gathering import gathered
from kw.ways.task import Task

WAYS = [way for way in kw.functional.WAYS if way != "auto"]
HOPELESS = 5  # times the plain way's multiply-adds


@dataclass
class Call:
    """One layer's input, attentions and cells, as `kw.functional` sees them."""

    names: list[str]
    x: Tensor
    alpha: Tensor
    cells: Tensor
    task: Task

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.x.shape, self.cells.data_ptr(), self.task)


def record(model: nn.Module, image: Tensor) -> list[Call]:
    """The calls of a forward pass, one for each kind of layer."""
    calls: dict[tuple[Any, ...], Call] = {}
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, KWLayer)}
    current: list[str] = []
    hooks = [layer.register_forward_pre_hook(lambda module, _: current.append(names[module])) for layer in names]
    plain = kw.functional.FUNCTIONS["grouped"]

    def recording(x: Tensor, alpha: Tensor, cells: Tensor, task: Task) -> Tensor:
        call = Call([], x.detach(), alpha.detach(), cells.detach(), task)
        calls.setdefault(call.key, call).names.append(current[-1])
        return plain(x, alpha, cells, task)

    kw.functional.FUNCTIONS["grouped"] = recording
    try:
        with torch.no_grad(), kw.functional.use("grouped"):
            model(image)
    finally:
        kw.functional.FUNCTIONS["grouped"] = plain
        for hook in hooks:
            hook.remove()
    return list(calls.values())


def hopeful(call: Call) -> list[str]:
    """The ways that apply, but for those of many times the plain way's multiply-adds, which would take minutes."""
    done = work(tuple(call.x.shape), tuple(call.cells.shape), call.task)
    macs = {way: sum(q for name, q in done[way].items() if name.startswith(("apply", "mix"))) for way in done}
    return [way for way in done if macs[way] <= HOPELESS * macs["grouped"]]


def milliseconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - began)


def measure(call: Call, ways: list[str], repeats: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of a forward pass, and of one with its backward pass; the ways take turns.

    A step is timed for two layers that draw from the same cells: gradients of a warehouse's layers have to be added up.
    """
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    tensors = [t.clone().requires_grad_() for t in (call.x, call.alpha, call.cells)]
    x, alpha, cells = *tensors[:2], gathered(tensors[2])

    def forward(way: str) -> Tensor:
        return kw.functional.FUNCTIONS[way](x, alpha, cells, call.task)

    def step(way: str) -> None:
        outs = [forward(way) for _ in range(2)]
        torch.autograd.grad(outs, tensors, [out.detach() for out in outs])

    for _ in range(repeats + 1):
        for way in ways:
            with torch.no_grad():
                one = milliseconds(lambda: forward(way))  # noqa: B023
            times[way].append((one, milliseconds(lambda: step(way)) / 2))  # noqa: B023
    return {way: (median(a for a, _ in pairs[1:]), median(b for _, b in pairs[1:])) for way, pairs in times.items()}


def table(calls: list[Call], repeats: int) -> Table:
    """Expected milliseconds of a forward pass and of a step; with `repeats` also those measured, in parentheses."""
    shown = Table("layers", "input", "kernel", "cells", *WAYS)
    for call in calls:
        expected = [costs(call.x.shape, call.cells.shape, call.task, step) for step in (False, True)]
        taken = [cheapest(times) for times in expected]
        measured = measure(call, hopeful(call), repeats) if repeats else {}
        cells = []
        for way in WAYS:
            times = [
                f"{e[way] / 1e6:.1f}{'*' if way == best else ''}"
                for e, best in zip(expected, taken, strict=True)
                if way in e
            ]
            text = " ".join(times) or "-"
            cells.append(text + (" ({:.1f} {:.1f})".format(*measured[way]) if way in measured else ""))
        n, o, i = call.cells.shape
        P, R, C = call.task.grid
        name = call.names[0] + (f" + {len(call.names) - 1}" if len(call.names) > 1 else "")
        size = "x".join(map(str, call.x.shape[1:]))
        shown.add_row(name, size, f"{R * o}x{C * i}x{P}", f"{n} of {o}x{i}", *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="a name of kw.backbones, such as resnet18")
    parser.add_argument("n", nargs="?", default="1")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--measure", type=int, nargs="?", const=3, default=0, metavar="TIMES")
    options = parser.parse_args()
    model = timm.create_model(f"kw_{options.backbone}", n=options.n).eval()
    calls = record(model, torch.randn(options.batch, 3, options.size, options.size))
    console = Console(width=None if Console().is_terminal else 200)
    console.print(f"{options.backbone} n={options.n}, batch {options.batch}, {options.size} pixels.")
    console.print(
        f"Milliseconds expected of a forward pass and of a step{' (measured)' * bool(options.measure)}; * is taken."
    )
    console.print(table(calls, options.measure))


if __name__ == "__main__":
    main()
