"""What dynamic kernels cost against static ones: the static backbone, the plain implementation and the chosen one.

    python -m scripts.bench                                   the cases of `make bench`, float32, on the CPU
    python -m scripts.bench resnet18:1 resnet50:4@8 --what train eval --repeats 5
    python -m scripts.bench resnet18:4 resnet18:odconv4 resnet18:se    other dynamic convolutions
    python -m scripts.bench resnet18:1@8 --what eval one --choices auto frozen onnx onnx+static
    python -m scripts.bench --device cuda --dtype bfloat16 --choices grouped auto triton triton+folded frozen
    python -m scripts.bench --device cuda --dtype bfloat16 --what eval one --cuda-graph --choices auto frozen

A case is BACKBONE:N or BACKBONE:N@BATCH; in place of N also another method (`dcd`, `se` and `fdconv` have one
implementation: a difference between their columns is noise). `small` is for small images: ResNet18 with one block a
stage and a 3x3 stem of stride 2 without max pooling, so that its last stage has 2x2 positions; it always takes images
of 32 pixels.

    train    one step: forward, cross entropy, backward, gradients dropped; no optimizer; temperature 0
    eval     one forward pass in inference mode
    one      the same for a single image
    memory   how far two training steps raise the peak over what model and images hold already: resident memory of the
             process on a CPU, allocated memory on a GPU

A choice is an argument of `kw.functional.use`: how kernels are applied and, after "+", how they are made. For `eval`
and `one` there are also "frozen", a frozen copy of the model (`kw.freeze`), with narrow cells as "frozen+bfloat16" and
"frozen+int8"; and in onnxruntime "onnx", "onnx+frozen" and, to compare with, "onnx+static".

Each case has a process, in which the static backbone and the choices take turns in changing order, so that other load
on the machine affects all of them alike. On a CPU, memory takes a process for each of them. Figures are medians, with
quartiles. Excess is what a choice takes over the static backbone; the last columns are that in percent of the plain
choice's. TF32 and cuDNN's search for algorithms stay as PyTorch has them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import kw
from scripts.arguments import argument_parser
from scripts.bench.cases import BATCH, BATCHES, GPU_BATCH, Case, Settings, add_options, parse_case
from scripts.bench.evaluated import EVALUATED, ONNX
from scripts.bench.machine import machine
from scripts.bench.measure import FEWEST, measure
from scripts.bench.table import MEASURED, Row, draw, markdown, show, write_csv

CASES = ("resnet18:1", "resnet18:4", "resnet50:4", "convnext_tiny:1", "mobilenetv2_100:4", "small:1")
GPU_CASES = ("resnet18:1/4", "resnet18:1", "resnet18:4", "resnet50:1", "resnet50:4", "convnext_tiny:1",
             "mobilenetv2_100:4", "deit_tiny_patch16_224:4")  # fmt: skip


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


def parse_choice(text: str) -> str:
    if text not in EVALUATED:
        try:
            with kw.functional.use(*text.split("+")):
                pass
        except (ValueError, TypeError) as error:
            raise argparse.ArgumentTypeError(
                f"{text!r}: {error} Such as triton, triton+folded, frozen, onnx."
            ) from error
    return text


def parse(arguments: list[str] | None) -> tuple[list[Case], Settings, Path]:
    parser = argument_parser("bench", __doc__)
    add = parser.add_argument
    add("cases", nargs="*", type=parse_case, metavar="BACKBONE:N[@BATCH]",
        help=f"default: {' '.join(CASES)}; on a GPU {' '.join(GPU_CASES)}")  # fmt: skip
    add("--batch", type=int, help=f"of cases without one (default: {BATCH}; {BATCHES}; on a GPU {GPU_BATCH})")
    add("--size", type=int, default=224, help="of the images, except for `small` (default: 224)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: as PyTorch has it)")
    add("--repeats", type=int, default=20, help="rounds at most, after those to warm up (default: 20)")
    add("--seconds", type=float, default=60, help=f"after which no round is begun, from {FEWEST} on (default: 60)")
    add("--choices", nargs="+", type=parse_choice, default=["grouped", "auto"], metavar="CHOICE",
        help=f"besides static: {', '.join(kw.functional.CHOICES)}, with +folded; {', '.join(EVALUATED)}")  # fmt: skip
    add("--what", nargs="+", choices=list(MEASURED), default=list(MEASURED))
    add("--cuda-graph", action="store_true", help="run `eval` and `one` as a CUDA graph")
    add("--compile", action="store_const", const="default",
        help="with torch.compile, which takes a minute or more for each model")  # fmt: skip
    add("--compile-mode", dest="compile", choices=["default", "reduce-overhead"],
        help="the same in this mode; reduce-overhead makes CUDA graphs")  # fmt: skip
    add("--in-process", action="store_true", help="no process for each case: that saves its start, some 10 s on a GPU")
    add("--out", type=Path, default=Path("report/benchmark"), help="where the files go (default: report/benchmark)")
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    cuda = options["device"] == "cuda"
    cases, out = options.pop("cases"), options.pop("out")
    cases = cases or [parse_case(text) for text in (GPU_CASES if cuda else CASES)]
    options |= {"choices": tuple(options["choices"]), "what": tuple(options["what"])}
    _check(options, parser)
    return cases, Settings(**options), out


def _check(options: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    if options["repeats"] < 1:
        parser.error("--repeats: at least 1.")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here.")
    if options["device"] != "cuda" and options["cuda_graph"]:
        parser.error("--cuda-graph: needs --device cuda.")
    if options["cuda_graph"] and options["compile"] == "reduce-overhead":
        parser.error("--cuda-graph: --compile-mode reduce-overhead makes CUDA graphs already; leave one out.")
    if options["device"] == "cpu" and options["in_process"] and "memory" in options["what"]:
        parser.error("--in-process: memory on a CPU takes a process for each choice; leave one of both out.")
    if set(options["choices"]) <= set(EVALUATED) and not {"eval", "one"} & set(options["what"]):
        parser.error(f"--choices {' '.join(options['choices'])}: such models do not train; measure eval or one.")
    if set(options["choices"]) & set(ONNX) and options["device"] != "cpu":
        parser.error("--choices onnx: onnxruntime is measured on the CPU.")


if __name__ == "__main__":
    main()
