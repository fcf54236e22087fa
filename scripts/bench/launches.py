"""Kernels that each dynamic layer launches, and how often the host waits for the GPU: they limit small batches.

    python -m scripts.bench.launches resnet18 4                        counted on the CPU, as a GPU would compute it
    python -m scripts.bench.launches resnet18 4 --tau 0.5 --operators layer1.0.conv1
    python -m scripts.bench.launches resnet18 4 --device cuda --dtype bfloat16 --batch 128 --size 224

Without a GPU, each operator of torch counts as one kernel, unless it only makes a view or reserves memory; some take
several on a GPU (a convolution's backward pass), and Triton's kernels are counted and not run. With one, the launches
and waits that torch's profiler records are counted. A training step is a forward pass, cross entropy and a backward
pass; gradients are dropped before it, and there is no optimizer.

On the CPU, the operators of a dynamic layer's forward pass are counted by purpose: attention, making kernels, applying
them (with pooling, bias and copies). "rest" is what no dynamic layer does, and the sums of gradients.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import kw
from kw.backbones import BACKBONES
from kw.compute import implicit, operator
from kw.config import STATIC
from kw.layers import DynamicLayer, KWLayer
from scripts.arguments import argument_parser
from scripts.bench.cases import DTYPES, Case, Settings, add_options, create, images_of, parse_budget_word
from scripts.bench.machine import machine_name

REST = "rest"
RANGE = "layer: "  # names of the profiler's ranges begin so
PARTS = ("attention", "making", "applying")
MEMORY = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_",
          "_unsafe_view", "is_same_size", "sym_size", "sym_stride", "sym_numel", "set_"}  # fmt: skip
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Count:
    """Kernels and synchronizations, by (layer, phase, part); and the operators, in order."""

    def __init__(self) -> None:
        self.kernels: Counter[tuple[str, str, str]] = Counter()
        self.syncs: Counter[tuple[str, str, str]] = Counter()
        self.operators: list[tuple[tuple[str, str, str], str]] = []

    def total(self, counted: Counter[tuple[str, str, str]], layer: str = "", phase: str = "", part: str = "") -> int:
        """The sum of those with this layer, phase and part; an empty string matches all."""
        asked = (layer, phase, part)
        return sum(n for key, n in counted.items() if all(a in ("", k) for a, k in zip(asked, key, strict=True)))


class Labels:
    """Tracks which layer is running, and in which phase, by hooks on modules and on autograd nodes."""

    def __init__(self, model: nn.Module):
        self.layer, self.phase = REST, "forward"
        self.names = {layer: name for name, layer in model.named_modules() if isinstance(layer, DynamicLayer)}
        self._ranges: list[record_function] = []
        self._labelled: set[Any] = set()
        self._hooks = [layer.register_forward_pre_hook(self._enter_layer) for layer in self.names]
        self._hooks += [layer.register_forward_hook(self._leave_layer, always_call=True) for layer in self.names]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, name: str) -> None:
        self.layer = name
        self._ranges.append(record_function(RANGE + name))
        self._ranges[-1].__enter__()

    def _leave(self) -> None:
        self.layer = REST
        self._ranges.pop().__exit__(None, None, None)

    def _enter_layer(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._enter(self.names[layer])

    def _leave_layer(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor | None) -> None:
        self._leave()
        if isinstance(out, Tensor) and out.grad_fn is not None:
            self._label(out.grad_fn, self.names[layer], before=args[0].grad_fn)

    def _label(self, node: Any, name: str, before: Any) -> None:
        """Hook the autograd nodes between the layer's input and its output."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            # The autograd node of a warehouse's cells belongs to all its layers (kw/compute/gathering.py).
            if node is None or node is before or node in self._labelled or "_Gather" in node.name():
                continue
            self._labelled.add(node)
            node.register_prehook(lambda grads: self._enter(name))
            node.register_hook(lambda inputs, outputs: self._leave())
            waiting += [following for following, _ in node.next_functions]


class Operators(TorchDispatchMode):
    """Counts operators as they are dispatched."""

    def __init__(self, labels: Labels, count: Count):
        super().__init__()
        self.labels, self.count = labels, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kw":  # kw's operators: count those that they consist of
            with self:
                return _INSIDE[func](*args, **(kwargs or {}))
        if func.namespace == "aten":
            with self:  # within them, composite operators such as `to` and `reshape` arrive undecomposed
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            # The host has to know a value, or the size of a result.
            self.count.syncs[self._key()] += 1
        if func.namespace == "aten" and not func.is_view and func.overloadpacket.__name__ not in MEMORY:
            self.note(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        self.count.kernels[self._key()] += 1
        self.count.operators.append((self._key(), name))

    def _key(self) -> tuple[str, str, str]:
        labels = self.labels
        return labels.layer, labels.phase, "" if labels.layer == REST else _part(labels.phase)


_INSIDE = {
    torch.ops.kw.convolve.default: operator._forward._init_fn,
    torch.ops.kw.convolve_backward.default: operator._backward._init_fn,
}


def _part(phase: str) -> str:
    """The purpose of the calling code, by the innermost function of kw on the stack. There is none in the backward
    passes that autograd generates."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if path.endswith("kw/compute/mixing.py") or function in ("assemble", "maps"):
            return "making"
        if path.endswith("kw/attention.py"):
            return "attention"
        if path.endswith("kw/compute/operator.py"):
            return "applying"
        frame = frame.f_back
    return "applying" if phase == "forward" else "autograd"


class _Counted:
    """Replaces a Triton kernel: counts its launches, and runs nothing."""

    def __init__(self, name: str, note: Callable[[str], None]):
        self.name, self.note = name, note

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.note(f"triton:{self.name}")


@contextmanager
def triton_counted(note: Callable[[str], None]) -> Iterator[None]:
    """Make the implementation "triton" apply on the CPU; its kernels are counted, not run."""
    if implicit.triton is None:
        sys.exit("--choice triton: Triton is not installed (it comes with PyTorch for Linux). Choose another one.")
    from triton.runtime.jit import KernelInterface

    kernels = {name: kernel for name, kernel in vars(implicit).items() if isinstance(kernel, KernelInterface)}
    interpreted = implicit.INTERPRETED
    try:
        implicit.INTERPRETED = True
        for name in kernels:
            setattr(implicit, name, _Counted(name, note))
        yield
    finally:
        implicit.INTERPRETED = interpreted
        for name, kernel in kernels.items():
            setattr(implicit, name, kernel)


def step(model: nn.Module, image: Tensor, labels: Labels, train: bool, dtype: str) -> None:
    """One evaluation, or one training step."""
    labels.phase = "forward"
    model.train(train)
    autocast = torch.autocast(image.device.type, DTYPES[dtype], enabled=dtype != "float32")
    with torch.set_grad_enabled(train):
        with autocast:
            out = model(image)
        if train:
            loss = F.cross_entropy(out.float(), torch.arange(len(out), device=out.device) % 10)
            labels.phase = "backward"
            loss.backward()
    model.zero_grad()


def count_operators(model: nn.Module, image: Tensor, train: bool, dtype: str = "float32") -> Count:
    """As a GPU would compute it, counted on the CPU."""
    labels, count = Labels(model), Count()
    mode = Operators(labels, count)
    try:
        with ExitStack() as stack:
            if implicit.triton is not None:
                stack.enter_context(triton_counted(mode.note))
            stack.enter_context(mode)
            step(model, image, labels, train, dtype)
    finally:
        labels.remove()
    return count


def count_launches(model: nn.Module, image: Tensor, train: bool, dtype: str = "float32") -> Count:
    """On a GPU, as the profiler records them. A launch belongs to the layer in whose range it begins: while autograd's
    thread launches, the thread that called it waits."""
    labels, count = Labels(model), Count()
    try:
        for _ in range(3):
            step(model, image, labels, train, dtype)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step(model, image, labels, train, dtype)
            torch.cuda.synchronize()
    finally:
        labels.remove()
    attribute(profiler.events(), count)
    count.syncs[REST, "", ""] -= 1  # the synchronize above
    return count


def attribute(events: Any, count: Count) -> None:
    """Count the events that launch or wait, by the layers' ranges on the host. A copy from the device to pageable
    memory waits too: a cudaStreamSynchronize follows it, which is counted."""
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    ranges = sorted(
        (event.time_range.start, event.time_range.end, event.name.removeprefix(RANGE))
        for event in host
        if event.name.startswith(RANGE)
    )
    for event in host:
        start = event.time_range.start
        layer = next((name for begin, end, name in reversed(ranges) if begin <= start <= end), REST)
        if event.name.startswith(LAUNCHES):
            count.kernels[layer, "", ""] += 1
        elif event.name.startswith(SYNCS):
            count.syncs[layer, "", ""] += 1


def table(counts: dict[str, Count], names: list[str], phases: bool) -> Table:
    """Kernels by layer: of an evaluation ("eval"), and of a training step ("train")."""
    columns: list[tuple[str, Callable[[Count, str], int], str]] = []
    for what, title in (("eval", "evaluation"), ("train", "training step")):
        if phases and what == "eval":
            for part in PARTS:
                columns.append((part, lambda c, name, part=part: c.total(c.kernels, name, "forward", part), what))
        if phases and what == "train":
            columns.append(("forward", lambda c, name: c.total(c.kernels, name, "forward"), what))
            columns.append(("backward", lambda c, name: c.total(c.kernels, name, "backward"), what))
        columns.append((title, lambda c, name: c.total(c.kernels, name), what))
        columns.append(("waits", lambda c, name: c.total(c.syncs, name), what))
    shown = Table("layer", *(title for title, _, _ in columns))
    for column in shown.columns[1:]:
        column.justify = "right"
    for name in [*names, REST]:
        shown.add_row(name, *(str(of(counts[what], name)) for _, of, what in columns))
    shown.add_section()
    shown.add_row("all dynamic layers", *(str(sum(of(counts[w], n) for n in names)) for _, of, w in columns))
    shown.add_row("model", *(str(of(counts[what], "")) for _, of, what in columns))
    return shown


def counts_of(options: argparse.Namespace, n: str) -> tuple[dict[str, Count], list[str]]:
    """Counts of a training step and of an evaluation, and the names of the dynamic layers."""
    counting = count_launches if options.device == "cuda" else count_operators
    case = Case(options.backbone, n, options.batch)
    settings = Settings(options.device, options.dtype, options.channels_last, size=options.size)
    model, image = create(case, n, settings), images_of(case, options.batch, settings)
    if n != STATIC:
        kw.set_temperature(model, options.tau)
    names = [name for name, layer in model.named_modules() if isinstance(layer, KWLayer)]
    with kw.functional.use(*options.choice.split("+")):
        counts = {what: counting(model, image, what == "train", options.dtype) for what in ("eval", "train")}
    return counts, names


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser("bench.launches", __doc__)
    add = parser.add_argument
    add("backbone", choices=list(BACKBONES), help="such as resnet18")
    add("n", nargs="?", default="1", type=parse_budget_word)
    add("--batch", type=int, default=2)
    add("--size", type=int, default=64)
    add("--tau", type=float, default=0.0, help="temperature (default: 0)")
    add("--choice", help="of kw.functional.use: triton, triton+folded (default: triton; on a GPU: auto)")
    add("--operators", metavar="LAYER", help="list this layer's operators, in order")
    add_options(parser)
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.choice = options.choice or ("auto" if gpu else "triton")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(
        f"{options.backbone} n={options.n}, choice {options.choice}, temperature {options.tau:g}, "
        f"batch {options.batch}, {options.size} pixels, {options.dtype}, {machine_name(options.device)}: "
        f"{'launches' if gpu else 'operators, each as one kernel'}, and waits for the GPU."
    )
    counts, names = counts_of(options, options.n)
    console.print(table(counts, names, phases=not gpu))
    static, _ = counts_of(argparse.Namespace(**vars(options) | {"choice": "auto"}), STATIC)
    texts = [f"{w} {count.total(count.kernels)} and {count.total(count.syncs)}" for w, count in static.items()]
    console.print(f"The static backbone, kernels and waits: {', '.join(texts)}.")
    if options.operators:
        for what, count in counts.items():
            console.print(f"{options.operators}, {what}:")
            for (layer, phase, part), name in count.operators:
                if layer == options.operators:
                    console.print(f"  {phase:9} {part:10} {name}", markup=False)


if __name__ == "__main__":
    main()
