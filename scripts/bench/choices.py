"""How the dynamic layers of a backbone are computed: what each implementation should cost, and which one is chosen.

    python -m scripts.bench.choices resnet18 4                       costs by the cost model, at batch 16 and 224 pixels
    python -m scripts.bench.choices resnet18 4 --batch 1 --measure   and measured times
    python -m scripts.bench.choices resnet50 1 --device cuda --dtype bfloat16 --batch 128 --measure

Layers of the same shape on the same warehouse are one entry. A choice says how kernels are made and how they are
applied (kw/functional.py). Times are of the complete layer with its attention, at temperature 0. A choice with more
than five times the multiply-adds of the plain one is not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from kw.layers import KWLayer, KWLinear
from scripts.arguments import argument_parser
from scripts.bench.cases import DTYPES, Case, Settings, add_options, create, images_of, parse_budget_word
from scripts.bench.layers import visit_layers
from scripts.bench.timing import Clock, Sample, clock_of_torch, in_turns

PLAIN = Choice("cells", "grouped")
HOPELESS = 5  # multiples of the plain choice's multiply-adds
LAYERS_OF_STEP = 2  # on the same cells: the gradients of a warehouse's layers have to be summed
IN_A_ROW = {"cpu": 1, "cuda": 4}  # calls for one value: a model queues its layers on a GPU without waiting


@dataclass
class Call:
    """Layers of one kind: the first of them, and its input."""

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
        """The input of the convolution: tokens as positions, and padded where the convolution does not pad."""
        if isinstance(self.layer, KWLinear):
            return (self.x.flatten(1, -2) if self.x.dim() > 2 else self.x.unsqueeze(1)).transpose(1, 2)
        return self.x if self.layer.extra_padding is None else F.pad(self.x, self.layer.extra_padding)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.x.shape, self.layer.warehouse, self.geometry, self.hidden)

    def choices(self) -> list[Choice]:
        """Those that apply, without Triton's interpreter, which would take minutes."""
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
    """The inputs of layers in a forward pass, one call for each kind of layer."""
    calls: dict[tuple[Any, ...], Call] = {}

    def note(name: str, layer: KWLayer, x: Tensor) -> None:
        call = Call([], layer, x)
        calls.setdefault(call.key, call).names.append(name)

    visit_layers(model, image, note)
    return list(calls.values())


def hopeful(call: Call) -> list[Choice]:
    """The choices that apply, without those of many times the plain one's multiply-adds, which would take minutes."""
    most = HOPELESS * multiply_adds(call.work(PLAIN))
    return [choice for choice in call.choices() if multiply_adds(call.work(choice)) <= most]


def measure(
    call: Call,
    choices: list[Choice],
    rounds: int,
    dtype: str = "float32",
    seconds: float = float("inf"),
    clock: Clock = clock_of_torch,
) -> dict[Choice, tuple[float, float]]:
    """Seconds of a forward pass, and of one with its backward pass, for choices that did not fail: the least of all
    rounds, since other load on the machine only adds to them.

    Args:
        seconds: after which no round begins, for passes and steps each.
        clock: `time.process_time` for the CPU's time.
    """
    device = call.x.device.type
    found = []
    for function in (_forward, _step):
        calls = {choice: partial(function, call, choice, dtype) for choice in choices}
        plain = {choice: calls.pop(choice) for choice in choices if device == "cuda" and choice.apply == "grouped"}
        samples = _times(calls, rounds, seconds, IN_A_ROW[device], clock)
        found.append(samples | _times(plain, 1, seconds, 1, clock))  # so slow on a GPU that one round must do
    forward, step = found
    return {
        choice: (min(forward[choice].values), min(step[choice].values) / LAYERS_OF_STEP)
        for choice in choices
        if forward[choice].values and step[choice].values
    }


def _times(
    calls: dict[Choice, Callable[[], None]], rounds: int, seconds: float, in_a_row: int, clock: Clock
) -> dict[Choice, Sample]:
    named = {" ".join(choice): call for choice, call in calls.items()}
    samples = in_turns(named, rounds, seconds, times=in_a_row, clock=clock)
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
    """As in the benchmark's `--choices`: "triton", "triton+folded"."""
    return choice.apply if choice.make == MAKES[0] else f"{choice.apply}+{choice.make}"


def shown(calls: list[Call], rounds: int, dtype: str) -> Table:
    """Expected milliseconds of a forward pass and of a step; with `rounds`, also measured ones."""
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
    """The rule by which implementations are chosen on this device."""
    kind = device_kind(device)
    prices = table(kind)
    if prices is not None:
        return f"By prices measured on {prices.measured['device']} ({file_name(kind)})."
    if device.type == "cuda":
        return (
            f"No prices were measured for {kind!r} ({file_name(kind)}): kernels are applied by triton where it "
            f"applies, else by batched products, and made with the fewest multiply-adds. "
            f"python -m scripts.bench.fit_prices measures."
        )
    return f"No prices were measured for {kind!r} ({file_name(kind)}): the plain one is chosen."


def main() -> None:
    parser = argument_parser("bench.choices", __doc__)
    parser.add_argument("backbone", choices=list(BACKBONES), help="such as resnet18")
    parser.add_argument("n", nargs="?", default="1", type=parse_budget_word)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--measure", type=int, nargs="?", const=3, default=0, metavar="TIMES")
    add_options(parser)
    options = parser.parse_args()
    case = Case(options.backbone, options.n, options.batch)
    settings = Settings(options.device, options.dtype, options.channels_last, size=options.size)
    model, image = create(case, case.n, settings).eval(), images_of(case, options.batch, settings)
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    console.print(f"{options.backbone} n={options.n}, batch {options.batch}, {options.size} pixels, {options.dtype}.")
    console.print(rule(image.device))
    console.print("Milliseconds of a layer; * is chosen; – was not measured.")
    console.print(shown(record(model, image), options.measure, options.dtype))


if __name__ == "__main__":
    main()
