"""Whether an exported file computes what the model does, at batches and image sizes that the example does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCHES = (1, 3, 8)
CLOSE = 1e-4  # of the largest output
CLOSE_HALF = 2e-2  # with float16 weights


class ExportError(RuntimeError):
    """A model cannot be exported, or a file does not compute what the model does; the message says what to do."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and, if `difference` is not None, checked.

    Args:
        what: the format and the versions that were used.
        varying: the dimensions of the input that may have other sizes.
        difference: the largest from the model's output, over the largest output.
        tried: the other image sizes that it was checked at, besides the example's.
    """

    path: Path
    what: str
    varying: tuple[str, ...]
    difference: float | None = None
    tried: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        size = self.path.stat().st_size / 1e6
        agrees = "not checked"
        if self.difference is not None:
            sizes = "".join(f", and on images of {height} x {width}" for height, width in self.tried)
            agrees = f"agrees with PyTorch to {self.difference:.0e} at batches of {', '.join(map(str, BATCHES))}{sizes}"
        return f"Written to {self.path} ({size:.1f} MB): {self.what}; {', '.join(self.varying)} may vary; {agrees}"


def outputs(found: Any) -> list[Tensor]:
    """A model's outputs in a list: of a tensor, a sequence or a mapping."""
    if isinstance(found, Tensor):
        return [found]
    return [tensor for one in (found.values() if isinstance(found, dict) else found) for tensor in outputs(one)]


# From a tuple of inputs to a list of outputs.
Run = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]


def compare(
    model: nn.Module, run: Run, examples: tuple[Tensor, ...], varying: tuple[str, ...], tolerance: float, path: Path
) -> tuple[float, tuple[tuple[int, int], ...]]:
    """The largest difference of `run` from the model, over the largest output: at all batches, and on two images of
    twice the height, and of twice the width, where these may vary. And these sizes.

    Args:
        varying: the dimensions of the input that may have other sizes.

    Raises:
        ExportError: it is above the tolerance, or the file or the model does not run.
    """
    worst = difference(model, run, examples, tolerance, path)
    tried = []
    for name, times in (("height", (1, 1, 2, 1)), ("width", (1, 1, 1, 2))):
        if name in varying:
            larger = tuple(one.repeat(times) for one in examples)
            try:
                worst = max(worst, difference(model, run, larger, tolerance, path, batches=(2,)))
            except ExportError as error:
                raise ExportError(f"{error} With sizes=False only the batch varies.") from error
            tried.append((larger[0].shape[2], larger[0].shape[3]))
    return worst, tuple(tried)


@torch.no_grad()
def difference(
    model: nn.Module,
    run: Run,
    examples: tuple[Tensor, ...],
    tolerance: float,
    path: Path,
    batches: Sequence[int] = BATCHES,
) -> float:
    """The largest difference of `run` from the model, over the largest output, at these batches.

    Raises:
        ExportError: it is above the tolerance, or the file or the model does not run.
    """
    worst = 0.0
    for batch in batches:
        inputs = tuple(_of_batch(example, batch) for example in examples)
        shapes = " and ".join(str(tuple(one.shape)) for one in inputs)
        expected = _apply("The model", lambda inputs: outputs(model(*inputs)), inputs, shapes)
        found = _apply(str(path), run, inputs, shapes)
        for ours, theirs in zip(expected, found, strict=True):
            theirs = theirs.to(ours)
            if theirs.shape != ours.shape:
                raise ExportError(
                    f"{path} gives {tuple(theirs.shape)} for an input of {shapes}, the model {tuple(ours.shape)}."
                )
            scale = ours.abs().max().clamp(min=1e-12)
            worst = max(worst, float((theirs - ours).abs().max() / scale))
            if not worst <= tolerance:
                raise ExportError(
                    f"{path} differs from the model by {worst:.1e} of its largest output for an input of {shapes}, "
                    f"over {tolerance:.0e}: do not use it. Is the model's output large or unstable?"
                )
    return worst


def _apply(what: str, run: Run, inputs: tuple[Tensor, ...], shapes: str) -> Sequence[Tensor]:
    try:
        return run(inputs)
    except Exception as error:  # models and runtimes raise many kinds
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"{what} does not run on an input of {shapes}: {line}.") from error


def _of_batch(example: Tensor, batch: int) -> Tensor:
    """Other values of the example's kind, the same in each call."""
    generator = torch.Generator().manual_seed(batch)
    if not example.is_floating_point():
        return example[:1].expand(batch, *example.shape[1:]).contiguous()
    return torch.randn(batch, *example.shape[1:], generator=generator).to(example)
