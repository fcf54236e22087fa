"""Fit the prices of kw/compute/cost.py to times of this machine, and write them where kw reads them.

    python -m scripts.bench.fit_prices                        this CPU, float32: about half an hour on two cores
    python -m scripts.bench.fit_prices --device cuda --dtype bfloat16 --seconds 300
    python -m scripts.bench.fit_prices resnet18:4@16 small:1@64 --out prices.json

Every kind of dynamic layer of the models is timed with every choice that applies, forward and as a training step, in
turns (choices.py). The prices of each implementation minimize the squares of relative errors, and are never negative. A
choice with many times the plain one's multiply-adds is not timed: it would never be chosen.

The table contains where and how it was measured, and how well it fits: expected over measured time of each
implementation; the time of all layers, each by the chosen implementation, over that of the best one for each layer
("auto"); and the same with one choice for all layers. On a machine that others use, `--cpu-time --threads 1` measures
CPU time in place of wall time.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls

import kw.compute
from kw.compute import IMPLEMENTATIONS
from kw.compute.cost import Choice, Quantities, cost
from kw.compute.prices import Prices, Table, device_kind, file_name
from scripts.arguments import argument_parser
from scripts.bench.cases import Case, Settings, add_options, create, images_of, parse_case
from scripts.bench.choices import PLAIN, Call, hopeful, measure, name_of, record
from scripts.bench.machine import machine_name
from scripts.bench.timing import Clock, clock_of_torch
from train.jobs.provenance import provenance

CPU_CASES = ("resnet18:4@16", "resnet18:1@16", "resnet50:4@8", "convnext_tiny:1@8", "mobilenetv2_100:4@16",
             "small:1@64", "resnet18:4@1", "resnet18:1@1", "resnet50:4@1", "convnext_tiny:1@1",
             "mobilenetv2_100:4@1")  # fmt: skip
# The most important come first: --seconds may leave out the last.
GPU_CASES = ("resnet18:4@128", "resnet50:1@128", "resnet18:4@1", "convnext_tiny:1@128", "resnet50:4@128",
             "mobilenetv2_100:4@128", "resnet18:1@128", "deit_tiny_patch16_224:4@128", "resnet50:4@1",
             "convnext_tiny:1@1", "resnet50:1@1", "mobilenetv2_100:4@1", "deit_tiny_patch16_224:4@1")  # fmt: skip
SECONDS_OF_LAYER = 2.0  # for all choices of a layer: no round begins after them


class Timed(NamedTuple):
    """The work of a choice for a layer, and the nanoseconds that it took."""

    work: Quantities
    time: float


Layers = list[dict[Choice, Timed]]


def collect(
    cases: list[Case], settings: Settings, rounds: int, seconds: float, clock: Clock = clock_of_torch
) -> tuple[Layers, Layers]:
    """Times of forward passes, and of steps. No layer begins after `seconds`."""
    forward: Layers = []
    step: Layers = []
    began = time.perf_counter()
    for case, call in _calls(cases, settings):
        spent = time.perf_counter() - began
        if spent > seconds:
            print(f"{seconds:g} seconds are over: {case.backbone} n={case.n} from {call.names[0]} on is left out.")
            break
        times = measure(call, hopeful(call), rounds, settings.dtype, SECONDS_OF_LAYER, clock)
        work = {choice: call.work(choice) for choice in times}
        forward.append({choice: Timed(work[choice], 1e9 * one) for choice, (one, _) in times.items()})
        step.append({choice: Timed(work[choice], 1e9 * both) for choice, (_, both) in times.items()})
        print(f"{spent:5.0f} s  {case.backbone}:{case.n}@{len(call.x)}  {call.names[0]}: {_best(times)}", flush=True)
    return forward, step


def _calls(cases: list[Case], settings: Settings) -> Iterator[tuple[Case, Call]]:
    for case in cases:
        model = create(case, case.n, settings).eval()
        for call in record(model, images_of(case, settings.batch_of(case), settings)):
            yield case, call


def _best(times: dict[Choice, tuple[float, float]]) -> str:
    """The fastest choices of a layer, for the progress line."""
    best = [min(times, key=lambda choice: times[choice][which]) for which in (0, 1)]
    return ", ".join(f"{name_of(choice)} {1e3 * times[choice][k]:.2f} ms" for k, choice in enumerate(best))


def fit(samples: list[Timed]) -> tuple[dict[str, float], np.ndarray]:
    """Prices of one implementation, and the ratio of expected to measured time of each sample."""
    names = sorted({name for work, _ in samples for name in work})
    matrix = np.array([[work.get(name, 0.0) / time for name in names] for work, time in samples])
    scale = np.maximum(matrix.max(axis=0), 1e-30)
    prices, _ = nnls(matrix / scale, np.ones(len(samples)))
    return dict(zip(names, prices / scale, strict=True)), matrix @ (prices / scale)


def fit_all(layers: Layers) -> tuple[Prices, dict[str, list[float]]]:
    """Prices by implementation, zeros included; and the deciles 1, 5 and 9 of expected over measured time."""
    prices: Prices = {}
    spread: dict[str, list[float]] = {}
    for name in IMPLEMENTATIONS:
        samples = [timed for layer in layers for choice, timed in layer.items() if choice.apply == name]
        if samples:
            fitted, ratios = fit(samples)
            prices[name] = rounded(fitted)
            spread[name] = [round(float(ratio), 2) for ratio in np.quantile(ratios, (0.1, 0.5, 0.9))]
    return prices, spread


def rounded(prices: dict[str, float]) -> dict[str, float]:
    return {quantity: float(f"{price:.3g}") for quantity, price in prices.items()}


def over_best(layers: Layers, prices: Table, step: bool) -> dict[str, float]:
    """The time of all layers over that with the best choice for each: with the chosen implementation, and with each
    single choice (the plain one where it was not timed)."""
    single = sorted({choice for layer in layers for choice in layer}, key=name_of)
    totals = dict.fromkeys(("auto", *map(name_of, single)), 0.0)
    best = sum(min(timed.time for timed in layer.values()) for layer in layers)
    for layer in layers:
        costs = {choice: cost(choice, timed.work, prices, step) for choice, timed in layer.items()}
        known = {choice: nanoseconds for choice, nanoseconds in costs.items() if nanoseconds is not None}
        plain = layer.get(PLAIN, max(layer.values(), key=lambda timed: timed.time))  # PLAIN may have failed
        totals["auto"] += layer[min(known, key=lambda choice: known[choice])].time if known else plain.time
        for choice in single:
            totals[name_of(choice)] += layer.get(choice, plain).time
    return {name: round(total / best, 3) for name, total in totals.items()}


def table_of(forward: Layers, step: Layers, measured: dict[str, Any]) -> Table:
    """The table, and how well it fits."""
    (forward_prices, forward_spread), (step_prices, step_spread) = fit_all(forward), fit_all(step)
    table = Table(measured, forward_prices, step_prices)
    fits = {
        "layers": len(forward),
        "expected over measured, deciles 1, 5, 9": {"forward": forward_spread, "step": step_spread},
        "time over the best": {
            "forward": over_best(forward, table, step=False),
            "step": over_best(step, table, step=True),
        },
    }
    return table._replace(measured=measured | fits)


def provenance_of(settings: Settings, clock: Clock) -> dict[str, Any]:
    """Where and how the table was measured."""
    origin = provenance(*([kw.compute.implicit.triton] if kw.compute.implicit.triton else []))
    threads = {"threads": settings.threads} if settings.device == "cpu" else {}
    return {
        "device": machine_name(settings.device),
        **threads,
        **({"clock": "CPU time of the process"} if clock is time.process_time else {}),
        "dtype": settings.dtype,
        "layout": settings.layout_name,
        "command": shlex.join(["python", "-m", "scripts.bench.fit_prices", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        **{name: origin["versions"][name] for name in ("torch", "triton") if name in origin["versions"]},
        "commit": origin["commit"],
    }


def write(table: Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table._asdict(), indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser("bench.fit_prices", __doc__)
    add = parser.add_argument
    add("cases", nargs="*", type=parse_case, metavar="BACKBONE:N[@BATCH]")
    add("--repeats", type=int, default=3, help="rounds at most, after one to warm up")
    add("--seconds", type=float, default=float("inf"), help="after which no layer begins")
    add("--out", type=Path, help="default: where kw reads it, in kw/compute/price_tables")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: as PyTorch has it)")
    add("--cpu-time", action="store_true", help="measure CPU time in place of wall time")
    add_options(parser)
    options = parser.parse_args(arguments)
    settings = Settings(options.device, options.dtype, options.channels_last, options.threads)
    cases = options.cases or [parse_case(text) for text in (GPU_CASES if options.device == "cuda" else CPU_CASES)]
    torch.set_num_threads(settings.threads)
    clock = time.process_time if options.cpu_time else clock_of_torch
    origin = provenance_of(settings, clock)  # before anything is written, which would mark the commit as changed
    forward, step = collect(cases, settings, options.repeats, options.seconds, clock)
    if not forward:
        sys.exit("No layer was timed: raise --seconds.")
    table = table_of(forward, step, origin)
    if options.device == "cuda":
        # On an H100 any layer's forward pass took 0.7 to 1.1 ms, in which Python launched it. That says nothing of the
        # kernels, which decide once launching is hidden or recorded in a CUDA graph.
        table = table._replace(forward={})
    out = options.out or Path(kw.compute.__file__).parent / "price_tables" / file_name(
        device_kind(torch.device(options.device))
    )
    write(table, out)
    print(out.read_text())
    print(f"Written to {out}")


if __name__ == "__main__":
    main()
