"""How the dynamic layers of a backbone are computed: what each choice should cost, and which one is taken.

    python -m scripts.bench.choices resnet18 4                       what the cost model expects, at batch 16 and 224 px
    python -m scripts.bench.choices resnet18 4 --batch 1 --measure   beside it what was measured
    python -m scripts.bench.choices resnet50 1 --device cuda --dtype bfloat16 --batch 128 --measure

Layers of the same shape that draw from the same warehouse are one entry. A choice says how kernels are made and how
they are applied (kw/functional.py). What is timed is the whole layer, its attention included, at temperature 0. A
choice with many times the plain one's multiply-adds is not measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import kw
from kw.backbones import BACKBONES
from kw.compute import IMPLEMENTATIONS, MAKES, Geometry
from kw.compute.cost import Choice, Quantities, applies, best, cost, multiply_adds, work
from kw.compute.prices import device_kind, file_name, table
from kw.config import parse_budget
from kw.layers import KWLayer, KWLinear
from scripts.bench.timing import Clock, Sample, by_turns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = Choice("cells", "grouped")
HOPELESS = 5  # times the plain choice's multiply-adds
LAYERS_OF_STEP = 2  # that draw from the same cells: gradients of a warehouse's layers have to be added up
IN_A_ROW = {"cpu": 1, "cuda": 4}  # calls for one value: a model gives a GPU its layers without waiting for each


@dataclass
class Call:
    """Layers of one kind: the first of them, and what it was given."""

    names: list[str]
    layer: KWLayer
    x: Tensor

    @property
    def cells(self) -> Tensor:
        return self.layer.warehouse.cells

    @property
    def geometry(self) -> Geometry:
        return self.layer.geometry

    @property
    def hidden(self) -> int:
        return self.layer.attention.fc1.out_features

    @property
    def seen(self) -> Tensor:
        """The input as it is convolved: tokens are positions, and padding is done that the convolution does not do."""
        if isinstance(self.layer, KWLinear):
            return (self.x.flatten(1, -2) if self.x.dim() > 2 else self.x.unsqueeze(1)).transpose(1, 2)
        return self.x if self.layer.extra_padding is None else F.pad(self.x, self.layer.extra_padding)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.x.shape, self.layer.warehouse, self.geometry, self.hidden)

    def choices(self) -> list[Choice]:
        """Those that apply. Triton's interpreter is none: it would take minutes."""
        makes = MAKES if self.layer.attention.is_affine else MAKES[:1]
        names = [name for name in IMPLEMENTATIONS if name != "triton" or self.x.is_cuda]
        x = self.seen
        return [Choice(make, name) for make in makes for name in names if applies(name, make, x, self.geometry)]

    def work(self, choice: Choice) -> Quantities:
        shapes = tuple(self.seen.shape), tuple(self.cells.shape)
        return work(choice, *shapes, self.geometry, self.hidden, self.x.device.type)

    def taken(self, choices: list[Choice], step: bool) -> Choice:
        shapes = tuple(self.seen.shape), tuple(self.cells.shape)
        return best(tuple(choices), *shapes, self.geometry, self.hidden, step, device_kind(self.x.device))


def record(model: nn.Module, image: Tensor) -> list[Call]:
    """What the layers are given in a forward pass, one call for each kind of layer."""
    calls: dict[tuple[Any, ...], Call] = {}
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, KWLayer)}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, KWLayer)
        call = Call([], layer, args[0].detach())
        calls.setdefault(call.key, call).names.append(names[layer])

    hooks = [layer.register_forward_pre_hook(note) for layer in names]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return list(calls.values())


def hopeful(call: Call) -> list[Choice]:
    """The choices that apply, but for those of many times the plain one's multiply-adds, which would take minutes."""
    most = HOPELESS * multiply_adds(call.work(PLAIN))
    return [choice for choice in call.choices() if multiply_adds(call.work(choice)) <= most]


def measure(
    call: Call,
    choices: list[Choice],
    rounds: int,
    dtype: str = "float32",
    seconds: float = float("inf"),
    clock: Clock = time.perf_counter,
) -> dict[Choice, tuple[float, float]]:
    """Seconds of a forward pass, and of one with its backward pass, of choices that did not fail: the least of all
    rounds, for what else the machine does only adds to them.

    Args:
        seconds: after which no round is begun, of passes and of steps each.
        clock: of a CPU.
    """
    device = call.x.device.type
    found = []
    for function in (_forward, _step):
        calls = {choice: partial(function, call, choice, dtype) for choice in choices}
        plain = {choice: calls.pop(choice) for choice in choices if device == "cuda" and choice.apply == "grouped"}
        samples = _times(calls, device, rounds, seconds, IN_A_ROW[device], clock)
        found.append(samples | _times(plain, device, 1, seconds, 1, clock))  # so slow on a GPU that once must do
    forward, step = found
    return {
        choice: (min(forward[choice].values), min(step[choice].values) / LAYERS_OF_STEP)
        for choice in choices
        if forward[choice].values and step[choice].values
    }


def _times(
    calls: dict[Choice, Callable[[], None]], device: str, rounds: int, seconds: float, in_a_row: int, clock: Clock
) -> dict[Choice, Sample]:
    named = {" ".join(choice): call for choice, call in calls.items()}
    samples = by_turns(named, device, rounds, seconds, warm_up=1, times=in_a_row, clock=clock)
    return {choice: samples[" ".join(choice)] for choice in calls}


def _layer(call: Call, x: Tensor, choice: Choice, dtype: str) -> Tensor:
    autocast = torch.autocast(x.device.type, DTYPES[dtype], enabled=dtype != "float32")
    with kw.functional.use(choice.apply, choice.make), autocast:
        return call.layer(x)


@torch.no_grad()
def _forward(call: Call, choice: Choice, dtype: str) -> None:
    _layer(call, call.x, choice, dtype)


def _step(call: Call, choice: Choice, dtype: str) -> None:
    x = call.x.detach().requires_grad_()
    outs = [_layer(call, x, choice, dtype) for _ in range(LAYERS_OF_STEP)]
    needed = [x, call.cells, *call.layer.parameters()]
    torch.autograd.grad(outs, needed, [torch.ones_like(out) for out in outs])


def name_of(choice: Choice) -> str:
    """As the benchmark's `--choices` has it: "triton", "triton+folded"."""
    return choice.apply if choice.make == MAKES[0] else f"{choice.apply}+{choice.make}"


def shown(calls: list[Call], rounds: int, dtype: str) -> Table:
    """Expected milliseconds of a forward pass and of a step; with `rounds` also those measured."""
    titles = ["forward", "step", *(["forward measured", "step measured"] if rounds else [])]
    table_ = Table("layers", "input", "kernel", "cells", "choice", *titles)
    for call in calls:
        choices = call.choices()
        measured = measure(call, hopeful(call), rounds, dtype) if rounds else {}
        table_.add_section()
        head = _head(call)
        for choice in choices:
            cells = [_expected(call, choice, choices, step) for step in (False, True)]
            if rounds:
                cells += [f"{1e3 * t:.2f}" for t in measured[choice]] if choice in measured else ["–", "–"]
            table_.add_row(*head, name_of(choice), *cells)
            head = [""] * 4
    return table_


def _head(call: Call) -> list[str]:
    n, o, i = call.cells.shape
    P, R, C = call.geometry.grid
    name = call.names[0] + (f" + {len(call.names) - 1}" if len(call.names) > 1 else "")
    return [name, "x".join(map(str, call.x.shape[1:])), f"{R * o}x{C * i}x{P}", f"{n} of {o}x{i}"]


def _expected(call: Call, choice: Choice, choices: list[Choice], step: bool) -> str:
    prices = table(device_kind(call.x.device))
    expected = None if prices is None else cost(choice, call.work(choice), prices, step)
    star = "*" if call.taken(choices, step) == choice else ""
    return ("–" if expected is None else f"{expected / 1e6:.2f}") + star


def rule(device: torch.device) -> str:
    """What the choice goes by."""
    kind = device_kind(device)
    prices = table(kind)
    if prices is not None:
        return f"By prices measured on {prices.measured['device']} ({file_name(kind)})."
    if device.type == "cuda":
        return (
            f"No prices were measured for {kind!r} ({file_name(kind)}): kernels are applied by triton where it "
            f"applies, else by batched products, and made by the fewest multiply-adds. "
            f"python -m scripts.bench.fit_prices measures."
        )
    return f"No prices were measured for {kind!r} ({file_name(kind)}): the plain choice is taken."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of every script that runs a backbone here."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="others than float32 mean autocast")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="default: on a GPU")


def budget(text: str) -> str:
    """n as it was typed. Raises argparse's error for what is no budget."""
    try:
        parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=list(BACKBONES), help="such as resnet18")
    parser.add_argument("n", nargs="?", default="1", type=budget)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--measure", type=int, nargs="?", const=3, default=0, metavar="TIMES")
    add_options(parser)
    options = parser.parse_args()
    device = torch.device(options.device)
    last = options.device == "cuda" if options.channels_last is None else options.channels_last
    layout = torch.channels_last if last else torch.contiguous_format
    model = timm.create_model(f"kw_{options.backbone}", n=options.n).eval().to(device, memory_format=layout)
    image = torch.randn(options.batch, 3, options.size, options.size).to(device, memory_format=layout)
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    console.print(f"{options.backbone} n={options.n}, batch {options.batch}, {options.size} pixels, {options.dtype}.")
    console.print(rule(device))
    console.print("Milliseconds of a layer; * is taken; – was not measured.")
    console.print(shown(record(model, image), options.measure, options.dtype))


if __name__ == "__main__":
    main()
