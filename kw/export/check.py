"""Whether an exported file computes what the model does."""

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
    """

    path: Path
    what: str
    varying: tuple[str, ...]
    difference: float | None

    def __str__(self) -> str:
        size = self.path.stat().st_size / 1e6
        agrees = "not checked" if self.difference is None else (
            f"agrees with PyTorch to {self.difference:.0e} at batches of {', '.join(map(str, BATCHES))}"
        )  # fmt: skip
        return f"Written to {self.path} ({size:.1f} MB): {self.what}; {', '.join(self.varying)} may vary; {agrees}"


def outputs(found: Any) -> list[Tensor]:
    """A model's outputs in a list: of a tensor, a sequence or a mapping."""
    if isinstance(found, Tensor):
        return [found]
    return [tensor for one in (found.values() if isinstance(found, dict) else found) for tensor in outputs(one)]


@torch.no_grad()
def difference(
    model: nn.Module,
    run: Callable[[tuple[Tensor, ...]], Sequence[Tensor]],
    examples: tuple[Tensor, ...],
    tolerance: float,
    path: Path,
) -> float:
    """The largest difference of `run` from the model, over the largest output, at all batches.

    Raises:
        ExportError: it is above the tolerance.
    """
    worst = 0.0
    for batch in BATCHES:
        inputs = tuple(_of_batch(example, batch) for example in examples)
        for ours, theirs in zip(outputs(model(*inputs)), run(inputs), strict=True):
            theirs = theirs.to(ours)
            if theirs.shape != ours.shape:
                raise ExportError(
                    f"{path} gives {tuple(theirs.shape)} for a batch of {batch}, the model {tuple(ours.shape)}."
                )
            scale = ours.abs().max().clamp(min=1e-12)
            worst = max(worst, float((theirs - ours).abs().max() / scale))
            if not worst <= tolerance:
                raise ExportError(
                    f"{path} differs from the model by {worst:.1e} of its largest output at a batch of {batch}, over "
                    f"{tolerance:.0e}: do not use it. Is the model's output large or unstable?"
                )
    return worst


def _of_batch(example: Tensor, batch: int) -> Tensor:
    """Other values of the example's kind, the same in each call."""
    generator = torch.Generator().manual_seed(batch)
    if not example.is_floating_point():
        return example[:1].expand(batch, *example.shape[1:]).contiguous()
    return torch.randn(batch, *example.shape[1:], generator=generator).to(example)
