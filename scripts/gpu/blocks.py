"""Does kw/compute/implicit.py choose its blocks well? Times the chosen, other blocks, and torch's convolution.

    python -m scripts.gpu.blocks --seconds 50 --out report/gpu/blocks/blocks.csv
    python -m scripts.gpu.blocks --dry --out /tmp/blocks.csv            two small layers in Triton's interpreter

For the layers of ResNet18 and ResNet50 that Triton's kernels compute, at batch 128: forward, gradient of the input and
gradient of the kernels. From the chosen block, one thing is changed at a time (rows, columns, depth, warps, stages),
and a few pairs of them. "static" is torch's convolution of the same size, which has one kernel for all samples.

Compilation takes most of the time. Several processes compile first, in parallel, beginning with the chosen blocks and
the costliest layers. Blocks that are not compiled within their share of the seconds are not timed.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from kw.compute import Geometry, implicit, samples
from kw.compute.implicit import Block
from kw.layers import KWLayer
from scripts.arguments import argument_parser
from scripts.bench.layers import visit_layers
from scripts.bench.timing import in_turns

BACKBONES = ("resnet18", "resnet50")
BATCH = 128
COMPILING, PROCESSES = 0.6, 12  # share of the seconds, and how many compile
FLOAT32_LAYERS = 2  # this many of the costliest layers are timed in float32, too
PASSES = ("forward", "grad_input", "grad_kernels")
COLUMNS = ("layer", "dtype", "pass", "rows", "columns", "depth", "warps", "stages", "chosen", "microseconds", "tflops",
           "static_microseconds")  # fmt: skip
Line = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """A convolution: the name of the first such layer, its cells `(o, i)`, and its input."""

    name: str
    geometry: Geometry
    cell: tuple[int, int]
    channels: int
    space: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16

    @property
    def multiply_adds(self) -> int:
        return self.geometry.mixtures * math.prod(self.cell) * math.prod(self.geometry.out_size(self.space))

    def tensors(self, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Input, kernels, and a gradient of the output; channels last."""
        rows = self.geometry.grid[1] * self.cell[0]
        shapes = (batch, self.channels, *self.space), (batch, rows, *self.geometry.out_size(self.space))
        x, grad = (
            torch.randn(shape, device=device, dtype=self.dtype).contiguous(memory_format=torch.channels_last)
            for shape in shapes
        )
        kernels = torch.randn(batch, *self.geometry.grid, *self.cell, device=device, dtype=self.dtype)
        return x, kernels, grad


@dataclass(frozen=True)
class Task:
    layer: Layer
    direction: str  # one of PASSES
    block: Block
    chosen: bool = False


def layers_of(backbone: str) -> list[Layer]:
    """The distinct layers that Triton's kernels compute, at 224 pixels."""
    model = timm.create_model(f"kw_{backbone}", n=1).eval()
    found: dict[tuple[object, ...], Layer] = {}

    def note(name: str, layer: KWLayer, x: Tensor) -> None:
        (o, i), geometry = layer.warehouse.cells.shape[-2:], layer.geometry
        if x.dim() == 4 and geometry.groups == 1 and not samples._is_matrix(geometry):
            new = Layer(f"{backbone}.{name}", geometry, (o, i), x.shape[1], (x.shape[2], x.shape[3]))
            found.setdefault((geometry, new.cell, new.space), new)

    visit_layers(model, torch.randn(1, 3, 224, 224), note)
    return sorted(found.values(), key=lambda layer: -layer.multiply_adds)


def others(chosen: Block) -> list[Block]:
    """Blocks near the chosen one; each has 4 KiB to 96 KiB of inputs a step, and enough work for its warps."""
    near = [chosen._replace(rows=rows) for rows in (32, 64, 128, 256)]
    near += [chosen._replace(columns=columns) for columns in (32, 64, 128, 256)]
    near += [chosen._replace(depth=chosen.depth // 2), chosen._replace(depth=chosen.depth // 2, stages=5)]
    near += [chosen._replace(warps=warps) for warps in (4, 8)]
    near += [chosen._replace(stages=stages) for stages in (2, 4)]
    near += [Block(128, 128, chosen.depth, 4, 3), Block(64, 64, chosen.depth, 4, 4)]
    fits = (b for b in near if b.rows * b.columns <= 128 * 256 and b.rows * b.columns // b.warps >= 256)
    return [block for block in dict.fromkeys(fits) if block != chosen]


class Chosen(Exception):
    """Raised when implicit.py has chosen a block, before it compiles."""


def chosen_block(layer: Layer, direction: str) -> Block:
    """The block that implicit.py chooses when it is called."""
    rule = implicit.blocks

    def watch(*arguments: Any, **more: Any) -> Block:
        raise Chosen(rule(*arguments, **more))

    implicit.blocks = watch
    try:
        call(layer, direction, *layer.tensors(1, device_of()))()
    except Chosen as found:
        block: Block = found.args[0]
        return block
    finally:
        implicit.blocks = rule
    raise RuntimeError(f"implicit.{direction} does not call implicit.blocks any more: update scripts/gpu/blocks.py.")


def call(layer: Layer, direction: str, x: Tensor, kernels: Tensor, grad: Tensor) -> Callable[[], None]:
    """The product of a direction; it overwrites `kernels` with their gradient."""
    arguments: dict[str, tuple[Any, ...]] = {
        "forward": (x, kernels, layer.geometry, torch.empty_like(grad)),
        "grad_input": (grad, kernels, layer.geometry, torch.empty_like(x)),
        "grad_kernels": (grad, x, layer.geometry, kernels),
    }
    return partial(getattr(implicit, direction), *arguments[direction])


@contextmanager
def forced(block: Block) -> Iterator[None]:
    """Make implicit.py choose this block for every product."""
    rule = implicit.blocks
    implicit.blocks = lambda *_, **__: block
    try:
        yield
    finally:
        implicit.blocks = rule


def static(layer: Layer, direction: str, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """torch's own convolution of the same size, in the same direction."""
    g = layer.geometry
    weight = torch.randn(grad.shape[1], x.shape[1], *g.kernel_size, device=x.device, dtype=x.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    sizes = (list(g.stride), list(g.padding), list(g.dilation), False, [0, 0], 1)
    if direction == "forward":
        return lambda: torch.ops.aten.convolution(x, weight, None, *sizes)
    mask = [direction == "grad_input", direction == "grad_kernels", False]
    return lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, mask)


def device_of() -> str:
    return "cpu" if implicit.INTERPRETED else "cuda"


def compile_task(task: Task) -> None:
    """Compile into Triton's cache on disk, in a separate process; few samples give the same kernel as many."""
    with forced(task.block):
        call(task.layer, task.direction, *task.layer.tensors(2, device_of()))()
    torch.cuda.synchronize()


def compiled(tasks: list[Task], seconds: float) -> list[Task]:
    """Tasks that were compiled in time, and fit into a multiprocessor's memory."""
    pool = ProcessPoolExecutor(PROCESSES, get_context("spawn"))
    futures = {pool.submit(compile_task, task): task for task in tasks}
    wait(futures, timeout=seconds)
    pool.shutdown(cancel_futures=True)
    return [task for future, task in futures.items() if not future.cancelled() and future.exception() is None]


def microseconds(run: Callable[[], object]) -> float:
    """Of one call, on a GPU: the least of three rounds, each of five calls, after one to warm up."""
    rounds = {"rounds": 1, "warm_up": 0} if device_of() == "cpu" else {"rounds": 3, "times": 5}
    sample = in_turns({"call": run}, **rounds)["call"]
    if sample.error:
        raise RuntimeError(sample.error)
    return 1e6 * min(sample.values)


def tasks_of(layers: list[Layer]) -> list[Task]:
    """First the chosen block of every layer and direction, then the others."""
    first = [Task(layer, direction, chosen_block(layer, direction), True) for layer in layers for direction in PASSES]
    return first + [replace(task, block=block, chosen=False) for task in first for block in others(task.block)]


def measure(tasks: list[Task], batch: int, seconds: float, out: Path) -> None:
    """Time the tasks, grouped by layer and direction, and write a line for each."""
    groups: dict[tuple[Layer, str], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.layer, task.direction), []).append(task)
    began = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for (layer, direction), group in groups.items():
            if time.monotonic() - began > seconds:
                print("Time is up: the remaining layers are left out.")
                break
            x, kernels, grad = layer.tensors(batch, device_of())
            usual = microseconds(static(layer, direction, x, grad))
            lines = []
            for task in group:
                with forced(task.block):
                    spent = microseconds(call(layer, direction, x, kernels, grad))
                lines.append(line(task, spent, usual, batch))
            writer.writerows(lines)
            file.flush()
            show(layer, direction, lines)


def line(task: Task, spent: float, usual: float, batch: int) -> Line:
    speed = 2 * batch * task.layer.multiply_adds / spent / 1e6
    what = {"layer": task.layer.name, "dtype": str(task.layer.dtype).removeprefix("torch."), "pass": task.direction}
    return {**what, **task.block._asdict(), "chosen": int(task.chosen), "microseconds": round(spent, 1),
            "tflops": round(speed, 1), "static_microseconds": round(usual, 1)}  # fmt: skip


def show(layer: Layer, direction: str, lines: list[Line]) -> None:
    """The chosen block, the fastest, and the static convolution."""
    fastest = min(lines, key=lambda each: each["microseconds"])
    print(f"{layer.name} {layer.space} {lines[0]['dtype']} {direction}, static {lines[0]['static_microseconds']} us")
    for title, each in (*(("chosen", each) for each in lines if each["chosen"]), (f"best of {len(lines)}", fastest)):
        block = "{rows}x{columns}x{depth}, {warps} warps, {stages} stages: {microseconds} us, {tflops} TFLOP/s"
        print(f"  {title} {block.format(**each)}", flush=True)


def main() -> None:
    parser = argument_parser("gpu.blocks", __doc__)
    parser.add_argument("--seconds", type=float, default=50.0, help="in total (default: 50)")
    parser.add_argument("--out", type=Path, default=Path("report/gpu/blocks/blocks.csv"))
    parser.add_argument("--dry", action="store_true", help="two small layers on the CPU, with TRITON_INTERPRET=1")
    options = parser.parse_args()
    if options.dry != implicit.INTERPRETED:
        parser.error("--dry goes together with the environment variable TRITON_INTERPRET=1.")
    if options.dry:
        geometries = [
            Geometry((9, 1, 2), (3, 3), (2, 2), (1, 1), (1, 1)),
            Geometry((1, 1, 2), (1, 1), (1, 1), (0, 0), (1, 1)),
        ]
        layers = [Layer(f"small {g.kernel_size}", g, (16, 16), 32, (4, 4), torch.float32) for g in geometries]
        measure([task for task in tasks_of(layers) if task.chosen], 2, math.inf, options.out)
        return
    began = time.monotonic()
    layers = sorted((layer for name in BACKBONES for layer in layers_of(name)), key=lambda layer: -layer.multiply_adds)
    layers += [replace(layer, dtype=torch.float32) for layer in layers[:FLOAT32_LAYERS]]
    tasks = tasks_of(layers)
    ready = compiled(tasks, COMPILING * options.seconds - (time.monotonic() - began))
    print(f"{len(ready)} of {len(tasks)} blocks were compiled in time.", flush=True)
    measure(ready, BATCH, options.seconds - (time.monotonic() - began), options.out)


if __name__ == "__main__":
    main()
