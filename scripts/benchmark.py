"""What dynamic kernels cost beside static ones: the static backbone, the plain way of computing and the chosen one.

    python -m scripts.benchmark                                   the cases of `make bench`, float32, on the CPU
    python -m scripts.benchmark resnet18:1 resnet50:4@8 --what train eval --repeats 5
    python -m scripts.benchmark resnet18:4 resnet18:odconv4 resnet18:se    other dynamic convolutions
    python -m scripts.benchmark resnet18:1 resnet18:4 --batch 128 --device cuda --dtype bfloat16

A case is BACKBONE:N or BACKBONE:N@BATCH; in place of N also another method with its n (`dcd` and `se` have one way of
computing: what is told of theirs is noise). `small` is for small images: ResNet18 with one block a stage and a 3x3 stem
of stride 2 without max pooling, so that its last stage has 2x2 positions; it always takes images of 32 pixels.

    train    one step: forward, cross entropy, backward, gradients dropped; no optimizer; temperature 0
    eval     one forward pass in inference mode
    one      the same for a single image
    memory   how far two training steps raise the peak over what model and images hold already: resident memory of the
             process on a CPU, allocated memory on a GPU

A case is timed in a process of its own, in which the static backbone and the ways take turns in changing order, so that
what else the machine does falls on all of them. Memory takes a process for each of them. Figures are medians, with
quartiles. Excess is what a way takes over the static backbone; the last column is that of the chosen way in percent of
the plain way's. TF32 and cuDNN's search for algorithms stay as PyTorch has them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import kw
from kw.backbones import BACKBONES, STATIC
from kw.baselines import BASELINES, check_budget
from kw.config import parse_budget
from kw.jobs.provenance import provenance
from scripts.benchmark_table import MEASURED, Row, Sample, draw, markdown, show, write_csv

SMALL, SMALL_SIZE = "small", 32
CASES = ("resnet18:1", "resnet18:4", "resnet50:4", "convnext_tiny:1", "mobilenetv2_100:4", "small:1")
BATCH, BATCHES = 16, {"resnet50": 8, "convnext_tiny": 8, SMALL: 64}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP = {"cpu": 1, "cuda": 3}  # rounds that do not count
FEWEST = 3  # rounds that do, whatever the time


@dataclass(frozen=True)
class Case:
    backbone: str
    n: str
    batch: int | None = None


@dataclass(frozen=True)
class Settings:
    """The command's options; what they mean is said there."""

    batch: int | None
    size: int
    device: str
    dtype: str
    threads: int
    repeats: int
    seconds: float
    ways: tuple[str, ...]
    what: tuple[str, ...]
    channels_last: bool

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def batch_of(self, case: Case) -> int:
        return case.batch or self.batch or BATCHES.get(case.backbone, BATCH)

    def size_of(self, case: Case) -> int:
        return SMALL_SIZE if case.backbone == SMALL else self.size


def parse_case(text: str) -> Case:
    match = re.fullmatch(r"(\w+):([^@]+)(?:@([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not BACKBONE:N or BACKBONE:N@BATCH, such as resnet50:4@8.")
    backbone, n, batch = match.groups()
    if backbone not in (SMALL, *BACKBONES):
        raise argparse.ArgumentTypeError(f"No backbone {backbone!r}; there are {', '.join((SMALL, *BACKBONES))}.")
    try:
        method(n)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return Case(backbone, n, int(batch) if batch else None)


def method(n: str) -> dict[str, str]:
    """What a case's N asks of `timm.create_model`: "4", "static", "odconv4" or "se". Raises ValueError for others."""
    word = re.match("[a-z]*", n)[0]  # type: ignore[index]
    if word not in BASELINES:
        return {"n": n if n == STATIC else str(parse_budget(n))}
    return {"dynamic": word, "n": str(check_budget(word, n.removeprefix(word) or 1))}


def create(case: Case, n: str, settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    if case.backbone == SMALL:
        model = timm.create_model("kw_resnet18", **method(n), layers=(1, 1, 1, 1), stem_stride=2)
    else:
        model = timm.create_model(f"kw_{case.backbone}", **method(n))
    return model.to(settings.device, memory_format=settings.layout)


def prepare(model: nn.Module, way: str, what: str, case: Case, settings: Settings) -> Callable[[], None]:
    """Set the model to training or evaluation; the call returned then does once what is to be measured."""
    size, batch = settings.size_of(case), 1 if what == "one" else settings.batch_of(case)
    images = torch.randn(batch, 3, size, size).to(settings.device, memory_format=settings.layout)
    targets = torch.arange(batch, device=settings.device) % 10
    dtype = DTYPES[settings.dtype]
    model.train(what in ("train", "memory"))

    def forward() -> Tensor:
        with torch.autocast(settings.device, dtype, enabled=dtype != torch.float32):
            return F.cross_entropy(model(images), targets) if model.training else model(images)

    def once() -> None:
        with kw.functional.use("auto" if way == STATIC else way):  # a static model has nothing to choose
            if model.training:
                forward().backward()
                model.zero_grad()
            else:
                with torch.inference_mode():
                    forward()

    return once


def seconds_of(once: Callable[[], None], device: str) -> float:
    began = time.perf_counter()
    once()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def by_turns(calls: dict[str, Callable[[], None]], settings: Settings) -> dict[str, Sample]:
    """Time the calls in rounds, each round in another order; one that fails is left out of the rounds after it."""
    times: dict[str, list[float]] = {way: [] for way in calls}
    errors: dict[str, str] = {}
    orders = itertools.cycle(itertools.permutations(calls))
    warm_up = WARM_UP[settings.device]
    for turn in range(-warm_up, settings.repeats):
        if turn == 0:
            began = time.perf_counter()
        if turn >= FEWEST and time.perf_counter() - began > settings.seconds:
            break
        for way in next(orders):
            if way not in errors:
                try:
                    times[way].append(seconds_of(calls[way], settings.device))
                except Exception as error:  # most likely out of memory; whatever it is, the table tells it
                    errors[way] = message(error)
    return {way: Sample((), errors[way]) if way in errors else Sample(tuple(times[way][warm_up:])) for way in calls}


def times_of(case: Case, settings: Settings) -> dict[str, dict[str, Sample]]:
    """Everything that is timed of a case, by what is measured and by way; one dynamic model serves all ways."""
    torch.set_num_threads(settings.threads)
    models = {STATIC: create(case, STATIC, settings)}
    models |= dict.fromkeys(settings.ways, create(case, case.n, settings))
    samples = {}
    for what in settings.what:
        if what != "memory":
            calls = {way: prepare(model, way, what, case, settings) for way, model in models.items()}
            samples[what] = by_turns(calls, settings)
    return samples


def peak_of(case: Case, way: str, settings: Settings) -> Sample:
    """How far two training steps raise the peak of memory, in bytes; for a process that has done nothing else."""
    torch.set_num_threads(settings.threads)
    once = prepare(create(case, STATIC if way == STATIC else case.n, settings), way, "memory", case, settings)
    cuda = settings.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: building the model may have had its own
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    once()
    once()
    return Sample((float((torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before),))


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak), in bytes. `getrusage` would not do: a new process inherits its parent's peak."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def message(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "the process was killed, most likely for want of memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own: with a fresh allocator, and one that may be killed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(case: Case, settings: Settings) -> list[Row]:
    ways = (STATIC, *settings.ways)
    samples: dict[str, dict[str, Sample]] = {}
    if set(settings.what) != {"memory"}:
        try:
            samples = elsewhere(times_of, case, settings)
        except Exception as error:
            failed = dict.fromkeys(ways, Sample((), message(error)))
            samples = {what: failed for what in settings.what if what != "memory"}
    if "memory" in settings.what:
        samples["memory"] = {}
        for way in ways:
            try:
                samples["memory"][way] = elsewhere(peak_of, case, way, settings)
            except Exception as error:
                samples["memory"][way] = Sample((), message(error))
    batch, size = settings.batch_of(case), settings.size_of(case)
    return [
        Row(case.backbone, case.n, 1 if what == "one" else batch, size, what, samples[what]) for what in settings.what
    ]


def machine(settings: Settings) -> dict[str, str]:
    """Everything outside the cases that decides a figure."""
    if settings.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
        name = f"{models[0] if models else 'CPU'}, {os.cpu_count()} cores"
    # What is known to decide speed or memory: the allocator, and how threads wait.
    keys = [key for key in sorted(os.environ) if re.match("LD_PRELOAD|MALLOC|GLIBC|OMP_|KMP_|MKL_|PYTORCH_", key)]
    return {
        "machine": name,
        "threads": str(settings.threads),
        "torch": torch.__version__,
        "dtype": settings.dtype,
        "layout": "channels last" if settings.channels_last else "contiguous",
        "environment": " ".join(f"{key}={os.environ[key]}" for key in keys) or "nothing set",
        "commit": re.sub(r"(?<=^\w{8})\w+", "", provenance()["commit"] or "unknown"),
    }


def parse(arguments: list[str] | None) -> tuple[list[Case], Settings, Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cases", nargs="*", type=parse_case, metavar="BACKBONE:N[@BATCH]", help=f"default: {' '.join(CASES)}")
    add("--batch", type=int, help=f"of cases without one (default: {BATCH}; {BATCHES})")
    add("--size", type=int, default=224, help="of the images, except for `small` (default: 224)")
    add("--device", choices=sorted(WARM_UP), default="cpu")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="bfloat16 means autocast")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: as PyTorch has it)")
    add("--repeats", type=int, default=20, help="rounds at most, after those to warm up (default: 20)")
    add("--seconds", type=float, default=60, help=f"after which no round is begun, from {FEWEST} on (default: 60)")
    add("--ways", nargs="+", choices=kw.functional.WAYS, default=["grouped", "auto"], help="beside the static backbone")
    add("--what", nargs="+", choices=list(MEASURED), default=list(MEASURED))
    add("--channels-last", action="store_true")
    add("--out", type=Path, default=Path("report/benchmark"), help="where the files go (default: report/benchmark)")
    options = vars(parser.parse_args(arguments))
    cases, out = options.pop("cases") or [parse_case(text) for text in CASES], options.pop("out")
    options |= {"ways": tuple(options["ways"]), "what": tuple(options["what"])}
    if options["repeats"] < 1:
        parser.error("--repeats: at least 1.")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here.")
    return cases, Settings(**options), out


def main(arguments: list[str] | None = None) -> None:
    cases, settings, out = parse(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    setup = machine(settings)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for case in cases:
        console.print(f"{case.backbone} n={case.n}: {', '.join(settings.what)} ...", markup=False)
        rows += measure(case, settings)
        # After each case, so that a long run that is stopped leaves what it has.
        (out / "benchmark.md").write_text(markdown(rows, setup))
        write_csv(rows, setup, out / "benchmark.csv")
        draw(rows, setup, out / "benchmark.png")
    show(rows, setup, console)
    console.print(f"Written to {out}: benchmark.md, benchmark.csv, benchmark.png")


if __name__ == "__main__":
    main()
