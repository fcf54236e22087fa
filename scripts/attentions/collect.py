"""Sums of a model's attentions by class, collected while images pass through the model.

Shapes: `K` classes, `m` mixtures of a layer, `n` cells of its warehouse; the last of `n + 1` is the zero cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kw.attention import FUNCTIONS, Attention
from kw.layers import KWLayer
from kw.warehouse import Share
from train.jobs.errors import DataError


def attend(attention: Attention, pooled: Tensor) -> Tensor:
    """The attentions `(B, m, n + 1)` that `attention` computes from `(B, C)`, with that to the zero cell, which it
    drops. With it, the absolute values of a row sum to 1 (if the attention function normalizes)."""
    values, divisor = FUNCTIONS[attention.attention_function](attention.scores(pooled).double())
    return (1 - attention.tau) * values / divisor + attention.tau * anchors(attention)


def anchors(attention: Attention) -> Tensor:
    """The attentions at temperature 1, one-hot `(m, n + 1)`; zeros if nothing is anchored."""
    if attention.beta is None:
        weight = attention.fc1.weight
        return weight.new_zeros(attention.mixtures, attention.cells + 1, dtype=torch.float64)
    beta = attention.beta.double()
    return torch.cat([beta, 1 - beta.sum(dim=1, keepdim=True)], dim=1)


@dataclass
class Sums:
    """Sums over images of one layer's attentions alpha."""

    share: Share
    counts: Tensor  # (K,), of images
    anchors: Tensor  # (m, n + 1)
    by_class: Tensor  # (K, m, n + 1), of alpha
    absolute: Tensor  # (m, n + 1), of |alpha|
    square: Tensor  # (m, n + 1), of alpha squared
    moved: Tensor  # (K, m), of half the absolute distance from the anchors; zeros if there are none

    @classmethod
    def empty(cls, layer: KWLayer, classes: int) -> Sums:
        start = anchors(layer.attention).cpu()
        zeros = torch.zeros_like(start)
        by_class, moved = zeros.new_zeros(classes, *zeros.shape), zeros.new_zeros(classes, len(zeros))
        counts = torch.zeros(classes, dtype=torch.long)
        return cls(layer.share, counts, start, by_class, zeros, zeros.clone(), moved)

    def add(self, alpha: Tensor, targets: Tensor) -> None:
        """Raises DataError: an attention is not finite."""
        if not alpha.isfinite().all():
            raise DataError(f"Layer {self.share.kernel.name!r}: its attentions are not finite on these images.")
        self.counts += torch.bincount(targets, minlength=len(self.counts))
        self.by_class.index_add_(0, targets, alpha)
        self.absolute += alpha.abs().sum(dim=0)
        self.square += alpha.square().sum(dim=0)
        if self.share.anchors is not None:
            self.moved.index_add_(0, targets, (alpha - self.anchors).abs().sum(dim=2) / 2)


@dataclass
class Collected:
    """Sums by layer, in the order in which images pass through the layers; and the number of images."""

    classes: list[str]
    images: int
    layers: dict[str, Sums] = field(default_factory=dict)


@torch.no_grad()
def collect(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: list[str]) -> Collected:
    """Send batches `(B, 3, H, W)` with their classes `(B,)` through the model, in evaluation mode.

    Raises:
        DataError: attentions are not finite, as in a model that diverged.
    """
    made = Collected(classes, 0)
    targets = torch.empty(0, dtype=torch.long)
    device = next(model.parameters()).device

    def hook(layer: KWLayer):  # type: ignore[no-untyped-def]
        def note(attention: Attention, inputs: tuple[Tensor]) -> None:
            sums = made.layers.setdefault(layer.share.kernel.name, Sums.empty(layer, len(classes)))
            sums.add(attend(attention, inputs[0]).cpu(), targets)

        return note

    layers = [module for module in model.modules() if isinstance(module, KWLayer)]
    hooks = [layer.attention.register_forward_pre_hook(hook(layer)) for layer in layers]
    try:
        for images, targets in batches:  # noqa: B007  the hooks read the targets
            made.images += len(images)
            model.eval()(images.to(device))
    finally:
        for handle in hooks:
            handle.remove()
    return made
