"""Time and memory of one case: the static backbone and the choices of computing the dynamic one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kw
from kw.config import STATIC
from scripts.bench import cases, timing
from scripts.bench.cases import DTYPES, Case, Settings
from scripts.bench.evaluated import EVALUATED, evaluated
from scripts.bench.memory import free, peak_of
from scripts.bench.table import Row
from scripts.bench.timing import WARM_UP, Sample, in_turns

FEWEST = 3  # rounds that count, whatever the time
Samples = dict[str, Sample]


def measure(case: Case, settings: Settings) -> list[Row]:
    run = here if settings.in_process else elsewhere
    timed = [what for what in settings.what if what != "memory"]
    samples: dict[str, Samples] = {}
    if timed:
        try:
            samples = run(times_of, case, settings)
        except Exception as error:
            failed = Sample((), message(error))
            samples = {what: dict.fromkeys(settings.names(what), failed) for what in timed}
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


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a new process: it has a fresh allocator, and may be killed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    free()
    return function(*arguments)


def message(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "the process was killed, most likely because memory ran out"
    return timing.message(error)


def times_of(case: Case, settings: Settings) -> dict[str, Samples]:
    """All times of a case, by what is measured and by choice."""
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
                failed[name] = Sample((), message(error))
        found = failed | in_turns(calls, settings.repeats, settings.seconds, FEWEST, WARM_UP[settings.device])
        samples[what] = {name: found[name] for name in settings.names(what)}
    return samples


def peaks_of(case: Case, names: tuple[str, ...], settings: Settings) -> Samples:
    """How far two training steps raise the peak of memory, in bytes. On a CPU, of one choice in a new process."""
    torch.set_num_threads(settings.threads)
    peaks = {}
    for name in names:
        try:
            model = cases.create(case, STATIC if name == STATIC else case.n, settings)
            call = prepare(model, name, "memory", case, settings)
            peaks[name] = Sample((float(peak_of(call, settings.device)),))
        except Exception as error:
            peaks[name] = Sample((), message(error))
    return peaks


def models_of(case: Case, settings: Settings, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The models by name; all choices share one dynamic model."""
    models = {STATIC: cases.create(case, STATIC, settings)}
    dynamic = cases.create(case, case.n, settings)
    for name in names:
        if name in EVALUATED:
            example = cases.images_of(case, 2, settings)
            models[name] = evaluated(name, dynamic, models[STATIC], example, settings.threads)
        elif name != STATIC:
            models[name] = dynamic
    return models


def prepare(model: nn.Module, name: str, what: str, case: Case, settings: Settings) -> Callable[[], object]:
    """Set the model to training or evaluation; the returned call does once what is to be measured."""
    images = cases.images_of(case, 1 if what == "one" else settings.batch_of(case), settings)
    targets = torch.arange(len(images), device=settings.device) % 10
    dtype = DTYPES[settings.dtype]
    model.train(what in ("train", "memory"))
    called = torch.compile(model, mode=settings.compile) if settings.compile else model
    # Neither a static model nor one that is only evaluated has implementations to choose from.
    choice = ["auto"] if name in (STATIC, *EVALUATED) else name.split("+")

    def forward() -> Tensor:
        # A captured graph has to cast weights in each pass: it cannot use the cache of the one before.
        cache = not settings.cuda_graph
        with torch.autocast(settings.device, dtype, enabled=dtype != torch.float32, cache_enabled=cache):
            return F.cross_entropy(called(images), targets) if model.training else called(images)

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
    """What the call launches on the GPU, as one CUDA graph, so that launching takes no time of Python's."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP["cuda"]):  # compiles, and lets libraries allocate: neither may be captured
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
