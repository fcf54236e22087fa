"""The cases of the benchmarks: which model, which images, on which device."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

import torch
from torch import nn

import kw
from kw.backbones import BACKBONES
from kw.baselines import check_budget
from kw.config import KW, STATIC, parse_budget
from scripts.bench.evaluated import EVALUATED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL, SMALL_SIZE = "small", 32
BATCH, BATCHES, GPU_BATCH = 16, {"resnet50": 8, "convnext_tiny": 8, SMALL: 64}, 128


@dataclass(frozen=True)
class Case:
    backbone: str
    n: str
    batch: int | None = None


@dataclass(frozen=True)
class Settings:
    """Options of `python -m scripts.bench`, whose help explains them."""

    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool | None = None  # None: on a GPU
    threads: int = 1
    batch: int | None = None
    size: int = 224
    repeats: int = 20
    seconds: float = 60.0
    choices: tuple[str, ...] = ("grouped", "auto")
    what: tuple[str, ...] = ()
    cuda_graph: bool = False
    compile: str | None = None  # a mode of torch.compile
    in_process: bool = False

    @property
    def layout(self) -> torch.memory_format:
        last = self.device == "cuda" if self.channels_last is None else self.channels_last
        return torch.channels_last if last else torch.contiguous_format

    @property
    def layout_name(self) -> str:
        return "channels last" if self.layout == torch.channels_last else "contiguous"

    def batch_of(self, case: Case) -> int:
        return case.batch or self.batch or (GPU_BATCH if self.device == "cuda" else BATCHES.get(case.backbone, BATCH))

    def size_of(self, case: Case) -> int:
        return SMALL_SIZE if case.backbone == SMALL else self.size

    def names(self, what: str) -> tuple[str, ...]:
        """The models that are measured: frozen ones and exported ones only in evaluation."""
        evaluates = what in ("eval", "one")
        return (STATIC, *(name for name in self.choices if name not in EVALUATED or evaluates))


def parse_case(text: str) -> Case:
    match = re.fullmatch(r"(\w+):([^@]+)(?:@([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not BACKBONE:N or BACKBONE:N@BATCH, such as resnet50:4@8.")
    backbone, n, batch = match.groups()
    if backbone not in (SMALL, *BACKBONES):
        raise argparse.ArgumentTypeError(f"There is no backbone {backbone!r}, but {', '.join((SMALL, *BACKBONES))}.")
    try:
        method(n)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return Case(backbone, n, int(batch) if batch else None)


def method(n: str) -> dict[str, str]:
    """The N of a case as arguments of `kw.create_model`: "4", "static", "odconv4" or "se". Raises ValueError."""
    word = re.match("[a-z]*", n)[0]  # type: ignore[index]
    if word == KW:
        raise ValueError(f"{n!r}: KernelWarehouse is written by its n alone, such as 4.")
    if word in ("", STATIC):
        return {"n": n if n == STATIC else str(parse_budget(n))}
    return {"dynamic": word, "n": str(check_budget(word, n.removeprefix(word) or 1))}


def parse_budget_word(text: str) -> str:
    """n as it was typed. Raises argparse's error if it is not a budget."""
    try:
        parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def create(case: Case, n: str, settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    if case.backbone == SMALL:
        model = kw.create_model("resnet18", **method(n), layers=(1, 1, 1, 1), stem_stride=2)
    else:
        model = kw.create_model(case.backbone, **method(n))
    return model.to(settings.device, memory_format=settings.layout)


def images_of(case: Case, batch: int, settings: Settings) -> torch.Tensor:
    size = settings.size_of(case)
    return torch.randn(batch, 3, size, size).to(settings.device, memory_format=settings.layout)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of every benchmark that runs a backbone."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="others than float32 mean autocast")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="default: on a GPU")
