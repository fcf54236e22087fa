"""Where the time of one evaluation and one training step goes, on the GPU and on its host.

    python -m scripts.gpu.profile resnet18:1 resnet50:4 --device cuda --dtype bfloat16 --channels-last

Prints for the static backbone and the dynamic one: wall time, the time that the GPU computes, and the kernels,
operators and Python functions that take most of it. A step whose wall time is well above its GPU time waits for Python
to launch kernels.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from kw.config import STATIC
from scripts.arguments import argument_parser
from scripts.bench.cases import Case, Settings, add_options, parse_case
from scripts.bench.measure import models_of, prepare
from scripts.bench.timing import clock_of_torch

ROUNDS = 5
ROWS = 14  # of each table
WIDTH = 90  # characters of a kernel's name


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser("gpu.profile", __doc__)
    parser.add_argument("cases", nargs="+", type=parse_case, metavar="BACKBONE:N[@BATCH]")
    parser.add_argument("--batch", type=int, help="of cases without one")
    parser.add_argument("--size", type=int, default=224, help="of the images (default: 224)")
    parser.add_argument("--choice", default="auto", help="of kw.functional.use (default: auto)")
    parser.add_argument("--what", nargs="+", choices=["train", "eval", "one"], default=["eval", "train"])
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    cases, choice = options.pop("cases"), options.pop("choice")
    settings = Settings(
        **options, threads=torch.get_num_threads(), repeats=ROUNDS, seconds=60.0, choices=(choice,),
        cuda_graph=False, in_process=True,
    )  # fmt: skip
    for case in cases:
        show(case, choice, settings)


def show(case: Case, choice: str, settings: Settings) -> None:
    models = models_of(case, settings, (STATIC, choice))
    for what in settings.what:
        for name, model in models.items():
            call = prepare(model, name, what, case, settings)
            for _ in range(3):
                call()
            began = clock_of_torch()
            for _ in range(ROUNDS):
                call()
            wall = (clock_of_torch() - began) / ROUNDS
            print(f"\n== {case.backbone} n={case.n} {what} {name}: wall {1e3 * wall:.2f} ms", flush=True)
            tables(call, settings)


def tables(call: Callable[[], object], settings: Settings) -> None:
    on_gpu = settings.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(ROUNDS):
            call()
        clock_of_torch()
        took = time.perf_counter() - began
    found = profiler.key_averages()
    kernels = [event for event in found if event.device_type.name == "CUDA"]
    busy = sum(event.self_device_time_total for event in kernels) / ROUNDS
    launched = sum(event.count for event in kernels) // ROUNDS
    print(f"profiled {1e3 * took / ROUNDS:.2f} ms; GPU {busy / 1e3:.2f} ms, {launched} kernels")
    for title, events, of in (
        ("on the GPU", kernels, lambda event: event.self_device_time_total),
        ("on the host", found, lambda event: event.self_cpu_time_total),
    ):
        print(f"{title}: microseconds, calls, name")
        for event in sorted(events, key=of, reverse=True)[:ROWS]:
            print(f"  {of(event) / ROUNDS:9.0f} {event.count / ROUNDS:7.1f}  {event.key[:WIDTH]}")
    python = cProfile.Profile()
    python.runcall(lambda: [call() for _ in range(ROUNDS)])
    pstats.Stats(python, stream=sys.stdout).sort_stats("tottime").print_stats(2 * ROWS)


if __name__ == "__main__":
    main()
