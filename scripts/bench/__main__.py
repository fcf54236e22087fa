"""What dynamic kernels cost beside static ones: the static backbone, the plain choice of computing and kw's own.

    python -m scripts.bench                                   the cases of `make bench`, float32, on the CPU
    python -m scripts.bench resnet18:1 resnet50:4@8 --what train eval --repeats 5
    python -m scripts.bench resnet18:4 resnet18:odconv4 resnet18:se    other dynamic convolutions
    python -m scripts.bench --device cuda --dtype bfloat16 --choices grouped auto triton triton+folded frozen
    python -m scripts.bench --device cuda --dtype bfloat16 --what eval one --cuda-graph --choices auto frozen

A case is BACKBONE:N or BACKBONE:N@BATCH; in place of N also another method with its n (`dcd` and `se` have one
implementation: a difference between their columns is noise). `small` is for small images: ResNet18 with one block a
stage and a 3x3 stem of stride 2 without max pooling, so that its last stage has 2x2 positions; it always takes images
of 32 pixels.

    train    one step: forward, cross entropy, backward, gradients dropped; no optimizer; temperature 0
    eval     one forward pass in inference mode
    one      the same for a single image
    memory   how far two training steps raise the peak over what model and images hold already: resident memory of the
             process on a CPU, allocated memory on a GPU

A choice is of `kw.functional.use`: how kernels are applied, and with "+folded" how they are made. "frozen" is a frozen
copy of the model (`kw.freeze`), for `eval` and `one`, chosen for as "auto".

A case is timed in a process of its own, in which the static backbone and the choices take turns in changing order, so
that what else the machine does falls on all of them. On a CPU, memory takes a process for each of them. Figures are
medians, with quartiles. Excess is what a choice takes over the static backbone; the last columns are that in percent of
the plain choice's. TF32 and cuDNN's search for algorithms stay as PyTorch has them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import kw
from kw.backbones import BACKBONES
from kw.baselines import BASELINES, check_budget
from kw.config import STATIC, parse_budget
from scripts.bench import timing
from scripts.bench.choices import DTYPES, add_options
from scripts.bench.table import FROZEN, MEASURED, Row, draw, markdown, show, write_csv
from scripts.bench.timing import Sample, by_turns
from train.jobs.provenance import provenance

SMALL, SMALL_SIZE = "small", 32
CASES = ("resnet18:1", "resnet18:4", "resnet50:4", "convnext_tiny:1", "mobilenetv2_100:4", "small:1")
GPU_CASES = ("resnet18:1/4", "resnet18:1", "resnet18:4", "resnet50:1", "resnet50:4", "convnext_tiny:1",
             "mobilenetv2_100:4", "deit_tiny_patch16_224:4")  # fmt: skip
BATCH, BATCHES, GPU_BATCH = 16, {"resnet50": 8, "convnext_tiny": 8, SMALL: 64}, 128
FEWEST = 3  # rounds that count, whatever the time


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
    choices: tuple[str, ...]
    what: tuple[str, ...]
    channels_last: bool
    cuda_graph: bool
    in_process: bool

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def layout_name(self) -> str:
        return "channels last" if self.channels_last else "contiguous"

    def batch_of(self, case: Case) -> int:
        return case.batch or self.batch or (GPU_BATCH if self.device == "cuda" else BATCHES.get(case.backbone, BATCH))

    def size_of(self, case: Case) -> int:
        return SMALL_SIZE if case.backbone == SMALL else self.size

    def names(self, what: str) -> tuple[str, ...]:
        """What takes part: a frozen model is for evaluation only."""
        evaluates = what in ("eval", "one")
        return (STATIC, *(name for name in self.choices if name != FROZEN or evaluates))


def parse_choice(text: str) -> str:
    if text != FROZEN:
        try:
            with kw.functional.use(*text.split("+")):
                pass
        except (ValueError, TypeError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error} Such as triton, triton+folded, {FROZEN}.") from error
    return text


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
        model = kw.create_model("resnet18", **method(n), layers=(1, 1, 1, 1), stem_stride=2)
    else:
        model = kw.create_model(case.backbone, **method(n))
    return model.to(settings.device, memory_format=settings.layout)


def prepare(model: nn.Module, name: str, what: str, case: Case, settings: Settings) -> Callable[[], object]:
    """Set the model to training or evaluation; the call returned then does once what is to be measured."""
    size, batch = settings.size_of(case), 1 if what == "one" else settings.batch_of(case)
    images = torch.randn(batch, 3, size, size).to(settings.device, memory_format=settings.layout)
    targets = torch.arange(batch, device=settings.device) % 10
    dtype = DTYPES[settings.dtype]
    model.train(what in ("train", "memory"))
    # Neither a static model nor a frozen one has anything to choose from.
    choice = ["auto"] if name in (STATIC, FROZEN) else name.split("+")

    def forward() -> Tensor:
        # A captured graph has to cast weights each time: the cache of the pass before is gone.
        with torch.autocast(
            settings.device, dtype, enabled=dtype != torch.float32, cache_enabled=not settings.cuda_graph
        ):
            return F.cross_entropy(model(images), targets) if model.training else model(images)

    def train() -> None:
        with kw.functional.use(*choice):
            forward().backward()
        model.zero_grad()

    @torch.inference_mode()
    def evaluate() -> None:
        with kw.functional.use(*choice):
            forward()

    if model.training:
        return train
    return captured(evaluate) if settings.cuda_graph else evaluate


def captured(call: Callable[[], None]) -> Callable[[], object]:
    """What the call launches on the GPU, as one CUDA graph: to launch it takes no time of Python's."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(timing.WARM_UP["cuda"]):  # compiles, and lets libraries get their memory: not to be captured
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def models_of(case: Case, settings: Settings, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The models by name; one dynamic model serves all choices."""
    models = {STATIC: create(case, STATIC, settings)}
    dynamic = create(case, case.n, settings)
    for name in names:
        if name == FROZEN:
            models[name] = copy.deepcopy(dynamic).eval()
            kw.freeze(models[name])
        elif name != STATIC:
            models[name] = dynamic
    return models


def times_of(case: Case, settings: Settings) -> dict[str, dict[str, Sample]]:
    """Everything that is timed of a case, by what is measured and by choice."""
    torch.set_num_threads(settings.threads)
    timed = [what for what in settings.what if what != "memory"]
    models = models_of(case, settings, tuple({name: None for what in timed for name in settings.names(what)}))
    samples = {}
    for what in timed:
        calls, failed = {}, {}
        for name in settings.names(what):
            try:
                calls[name] = prepare(models[name], name, what, case, settings)
            except Exception as error:  # in capturing a graph
                failed[name] = Sample((), timing.message(error))
        samples[what] = failed | by_turns(calls, settings.device, settings.repeats, settings.seconds, FEWEST)
        samples[what] = {name: samples[what][name] for name in settings.names(what)}
    return samples


def peaks_of(case: Case, names: tuple[str, ...], settings: Settings) -> dict[str, Sample]:
    """How far two training steps raise the peak of memory, in bytes. On a CPU, for one choice in a process that has
    done nothing else."""
    torch.set_num_threads(settings.threads)
    peaks = {}
    for name in names:
        try:
            peaks[name] = Sample((float(peak_of(case, name, settings)),))
        except Exception as error:
            peaks[name] = Sample((), timing.message(error))
    return peaks


def peak_of(case: Case, name: str, settings: Settings) -> int:
    once = prepare(create(case, STATIC if name == STATIC else case.n, settings), name, "memory", case, settings)
    cuda = settings.device == "cuda"
    if cuda:
        free()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: building the model may have had its own
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    once()
    once()
    return (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before


def free() -> None:
    """Give back a GPU's memory that the case before held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak), in bytes. `getrusage` would not do: a new process inherits its parent's peak."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own: with a fresh allocator, and one that may be killed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    free()
    return function(*arguments)


def measure(case: Case, settings: Settings) -> list[Row]:
    run = here if settings.in_process else elsewhere
    samples: dict[str, dict[str, Sample]] = {}
    if set(settings.what) != {"memory"}:
        try:
            samples = run(times_of, case, settings)
        except Exception as error:
            failed = Sample((), message(error))
            samples = {what: dict.fromkeys(settings.names(what), failed) for what in settings.what if what != "memory"}
    if "memory" in settings.what:
        names = settings.names("memory")
        samples["memory"] = {}
        for some in [names] if settings.device == "cuda" else [(name,) for name in names]:
            try:
                samples["memory"] |= run(peaks_of, case, some, settings)
            except Exception as error:
                samples["memory"] |= dict.fromkeys(some, Sample((), message(error)))
    batch, size = settings.batch_of(case), settings.size_of(case)
    return [
        Row(case.backbone, case.n, 1 if what == "one" else batch, size, what, samples[what]) for what in settings.what
    ]


def message(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "the process was killed, most likely for want of memory"
    return timing.message(error)


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{models[0] if models else 'CPU'}, {os.cpu_count()} cores"


def machine(settings: Settings) -> dict[str, str]:
    """Everything outside the cases that decides a figure."""
    # What is known to decide speed or memory: the allocator, and how threads wait.
    keys = [key for key in sorted(os.environ) if re.match("LD_PRELOAD|MALLOC|GLIBC|OMP_|KMP_|MKL_|PYTORCH_", key)]
    return {
        "machine": machine_name(settings.device),
        "threads": str(settings.threads),
        "torch": torch.__version__,
        "dtype": settings.dtype,
        "layout": settings.layout_name + (", evaluation as a CUDA graph" if settings.cuda_graph else ""),
        "environment": " ".join(f"{key}={os.environ[key]}" for key in keys) or "nothing set",
        "commit": re.sub(r"(?<=^\w{8})\w+", "", provenance()["commit"] or "unknown"),
    }


def parse(arguments: list[str] | None) -> tuple[list[Case], Settings, Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cases", nargs="*", type=parse_case, metavar="BACKBONE:N[@BATCH]",
        help=f"default: {' '.join(CASES)}; on a GPU {' '.join(GPU_CASES)}")  # fmt: skip
    add("--batch", type=int, help=f"of cases without one (default: {BATCH}; {BATCHES}; on a GPU {GPU_BATCH})")
    add("--size", type=int, default=224, help="of the images, except for `small` (default: 224)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: as PyTorch has it)")
    add("--repeats", type=int, default=20, help="rounds at most, after those to warm up (default: 20)")
    add("--seconds", type=float, default=60, help=f"after which no round is begun, from {FEWEST} on (default: 60)")
    add("--choices", nargs="+", type=parse_choice, default=["grouped", "auto"], metavar="CHOICE",
        help=f"beside the static one: {', '.join(kw.functional.CHOICES)}, with +folded; {FROZEN}")  # fmt: skip
    add("--what", nargs="+", choices=list(MEASURED), default=list(MEASURED))
    add("--cuda-graph", action="store_true", help="run `eval` and `one` as a CUDA graph")
    add("--in-process", action="store_true", help="no process for each case: that saves its start, some 10 s on a GPU")
    add("--out", type=Path, default=Path("report/benchmark"), help="where the files go (default: report/benchmark)")
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    cuda = options["device"] == "cuda"
    cases, out = options.pop("cases"), options.pop("out")
    cases = cases or [parse_case(text) for text in (GPU_CASES if cuda else CASES)]
    options |= {"choices": tuple(options["choices"]), "what": tuple(options["what"])}
    if options["channels_last"] is None:
        options["channels_last"] = cuda
    _check(options, parser)
    return cases, Settings(**options), out


def _check(options: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    if options["repeats"] < 1:
        parser.error("--repeats: at least 1.")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here.")
    if options["device"] != "cuda" and options["cuda_graph"]:
        parser.error("--cuda-graph: needs --device cuda.")
    if options["device"] == "cpu" and options["in_process"] and "memory" in options["what"]:
        parser.error("--in-process: memory on a CPU takes a process for each choice; leave one of both out.")
    if options["choices"] == (FROZEN,) and not {"eval", "one"} & set(options["what"]):
        parser.error(f"--choices {FROZEN}: a frozen model does not train; measure eval or one.")


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
