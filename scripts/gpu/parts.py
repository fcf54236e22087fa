"""The parts of a GPU run: what each runs, and how long it may take. The most important come first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

BUDGET = 8.0  # minutes; the limits below are for this total

# In a dry run: sizes and cases for a CPU.
DRY_MEASURE = ["small:1@2", "--repeats", "1", "--threads", "1", "--seconds", "1"]


@dataclass(frozen=True)
class Run:
    """The options of the command line."""

    out: Path
    minutes: float
    dry: bool = False
    data: Path | None = None


@dataclass(frozen=True)
class Part:
    """`command` returns the command line for a time limit in seconds. `seconds` is the part's limit; None: all the time
    that is left. `writes` are folders that it may write to, besides its own in the report."""

    name: str
    command: Callable[[float], list[str]]
    seconds: float | None
    writes: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def parts_of(run: Run) -> list[Part]:
    """All parts in order; their limits are in proportion to the run's minutes."""
    scale = run.minutes / BUDGET
    commands: list[tuple[str, Callable[[float], list[str]], float | None]] = [
        ("exactness", lambda limit: tests("implementations", run), 150),
        ("trainer", lambda limit: tests("trainer", run), 75),
        ("detection", lambda limit: tests("detection", run), 45),
        ("prices", lambda limit: prices(limit, run), 60),
        ("graphs", lambda limit: graphs(limit, run), 40),
        ("benchmark", lambda limit: benchmark(limit, run), 60),
        ("profile", lambda limit: profile(run), 30),
        ("blocks", lambda limit: blocks(limit, run), 40),
        ("training", lambda limit: training(limit, run), None),
    ]
    tables = (Path(__file__).parents[2] / "kw/compute/price_tables",)
    interpreter = {"TRITON_INTERPRET": "1"} if run.dry else {}
    return [
        Part(
            name,
            command,
            seconds and seconds * scale,
            tables if name == "prices" else (),
            interpreter if name == "blocks" else {},  # for the tests, tests/conftest.py sets it
        )
        for name, command, seconds in commands
    ]


def tests(name: str, run: Run) -> list[str]:
    """Several processes, to compile Triton's kernels in parallel."""
    processes = {"implementations": 2 if run.dry else 8, "trainer": 0 if run.dry else 4}.get(name, 0)
    options = ["-m", "gpu", "-rfEs", "--tb=short", "--show-capture=stdout", "--durations=8", "-p", "no:cacheprovider"]
    return python("pytest", f"tests/gpu/test_gpu_{name}.py", *options, "-n", str(processes))


def prices(limit: float, run: Run) -> list[str]:
    """Writes the table where kw reads it, ready to commit. A dry run writes to the report, to keep the CPU's table."""
    if run.dry:
        return python("scripts.bench.fit_prices", *DRY_MEASURE, "--out", str(run.out / "prices/cpu.json"))
    return python("scripts.bench.fit_prices", *on_gpu(), "--seconds", f"{0.75 * limit:.0f}")


def benchmark(limit: float, run: Run) -> list[str]:
    out = ["--in-process", "--out", str(run.out / "benchmark")]
    if run.dry:  # memory on a CPU needs a process for each measurement
        return python("scripts.bench", *DRY_MEASURE, "--what", "train", "eval", "one", *out)
    # 4 cases with 3 timed quantities each; two thirds of the time go to building models, warm-up and memory.
    cases = ["resnet18:1", "resnet18:4", "resnet50:1", "resnet50:4"]
    return python("scripts.bench", *cases, *on_gpu(), "--seconds", f"{limit / 3 / 12:.1f}", *out)


def graphs(limit: float, run: Run) -> list[str]:
    """Evaluation as a CUDA graph, in which launches cost nothing; also of frozen models."""
    out = ["--in-process", "--out", str(run.out / "graphs"), "--what", "eval", "one", "--choices", "auto", "frozen"]
    if run.dry:
        return python("scripts.bench", *DRY_MEASURE, *out)
    cases = ["resnet18:1", "resnet18:4", "resnet50:1", "resnet50:4"]
    return python("scripts.bench", *cases, *on_gpu(), "--cuda-graph", "--seconds", f"{limit / 3 / 8:.1f}", *out)


def profile(run: Run) -> list[str]:
    if run.dry:
        return python("scripts.gpu.profile", "small:1@2", "--what", "eval")
    return python("scripts.gpu.profile", "resnet18:1", *on_gpu())


def on_gpu() -> list[str]:
    return ["--device", "cuda", "--dtype", "bfloat16", "--channels-last"]


def blocks(limit: float, run: Run) -> list[str]:
    size = ["--dry"] if run.dry else ["--seconds", f"{0.85 * limit:.0f}"]
    return python("scripts.gpu.blocks", *size, "--out", str(run.out / "blocks/blocks.csv"))


def training(limit: float, run: Run) -> list[str]:
    """CIFAR-10 at full size, for as many epochs as there is time: one of both models takes about half a minute."""
    words = ["recipe.epochs=1", "recipe.warmup_epochs=0", "recipe.temperature_epochs=0.5"]
    if run.data is not None:
        epochs = max(1, int(limit / 40))
        warm_up = round(epochs * 6.7 / 100, 2)  # the same share of all epochs as in the experiment
        words = [f"recipe.epochs={epochs}", f"recipe.warmup_epochs={warm_up}", f"recipe.temperature_epochs={warm_up}"]
        words += ["experiment=cifar10/full", f"data.root={run.data.absolute()}"]
    elif not run.dry:
        words = ["recipe.epochs=12"]
    if run.dry:
        words += ["data.image_size=16", "data.train_images=64", "runtime.device=cpu"]
    else:
        words += [
            "runtime.device=cuda",
            "runtime.precision=bfloat16",
            "runtime.channels_last=true",
            "runtime.workers=12",
        ]
    folder = run.out / "training"
    return python("train", "-m", "n=static,4", *words, f"hydra.sweep.dir={folder}")
