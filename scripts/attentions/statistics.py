"""Statistics of a layer's attentions, from their sums.

Shares are of a mixture's absolute attentions, which sum to 1 with that to the zero cell. A layer's value is the mean
over its mixtures, a warehouse's over the mixtures of all its layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.attentions.collect import Collected, Sums

MEANINGS = {
    "own": "share of attention on the cells that the layer owns",
    "even": "what that share would be if all cells were used equally",
    "others": "on cells that other layers own",
    "zero": "on the zero cell",
    "negative": "share of attention that is negative",
    "effective": "cells that a mixture mixes, effectively: exp of the entropy of its mean absolute attentions",
    "anchored": "share of mixtures whose strongest cell is still their anchor",
    "kept": "mean attention of a mixture to its anchor: 1 at temperature 1",
    "moved": "half the distance (sum of absolute differences) from the anchors: from 0, all there, to 1, nothing there",
    "dynamic": "standard deviation over images, relative to the mean attentions: 0 is one kernel for all images",
    "by_class": "share of the variance over images that lies between classes, minus what chance gives: 1 is all of it",
}


@dataclass(frozen=True)
class LayerStatistics:
    """`MEANINGS` of one layer, and what the figures need.

    `mean`, `deviation`: over images, `(m, n)`; `shift`: how far each mixture moved, `(m,)`; `by_owner`: the share of
    its attention on the cells of each layer of the warehouse, the zero cell last, `(L + 1,)`; `classes`: half the
    distance of each class's mean attentions from the mean of all, `(K,)`.
    """

    name: str
    sums: Sums
    own: float
    even: float
    others: float
    zero: float
    negative: float
    effective: float
    anchored: float | None  # None, as the next two, if nothing is anchored
    kept: float | None
    moved: float | None
    dynamic: float
    by_class: float | None  # None if there is one class
    mean: Tensor
    deviation: Tensor
    shift: Tensor
    by_owner: Tensor
    classes: Tensor

    @property
    def warehouse(self) -> str:
        return self.sums.share.warehouse.name


def layer_statistics(name: str, sums: Sums) -> LayerStatistics:
    counts, images = sums.counts, sums.counts.sum()
    mean, absolute = sums.by_class.sum(dim=0) / images, sums.absolute / images
    variance = (sums.square / images - mean.square()).clamp(min=0)
    shares = absolute / absolute.sum(dim=1, keepdim=True)  # (m, n + 1)
    by_owner = _by_owner(shares.mean(dim=0), sums)
    here = [share.kernel.name for share in sums.share.warehouse.shares].index(name)
    own, zero = float(by_owner[here]), float(by_owner[-1])
    is_anchored = sums.share.anchors is not None
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1)
    shift = sums.moved.sum(dim=0) / images
    of_class = sums.by_class / counts.clamp(min=1).view(-1, 1, 1)
    distance = (of_class - mean).abs().sum(dim=2).mean(dim=1) / 2
    return LayerStatistics(
        name=name,
        sums=sums,
        own=own,
        even=sums.share.owned / mean.shape[1],
        others=max(1 - own - zero, 0.0),
        zero=zero,
        negative=float(((absolute - mean) / 2).sum(dim=1).mean()),
        effective=float(entropy.exp().mean()),
        anchored=float((absolute.argmax(1) == sums.anchors.argmax(1)).double().mean()) if is_anchored else None,
        kept=float((mean * sums.anchors).sum(dim=1).mean()) if is_anchored else None,
        moved=float(shift.mean()) if is_anchored else None,
        dynamic=float((variance.sum() / mean.square().sum().clamp(min=1e-12)).sqrt()),
        by_class=_between(of_class, mean, variance, counts),
        mean=mean[:, :-1],
        deviation=variance.sqrt()[:, :-1],
        shift=shift,
        by_owner=by_owner,
        classes=distance,
    )


def _by_owner(cells: Tensor, sums: Sums) -> Tensor:
    """Sums of `(n + 1,)` over the cells that each layer of the warehouse owns, the zero cell last: `(L + 1,)`."""
    shares = sums.share.warehouse.shares
    return torch.stack([*(cells[share.start : share.start + share.owned].sum() for share in shares), cells[-1]])


def _between(of_class: Tensor, mean: Tensor, variance: Tensor, counts: Tensor) -> float | None:
    """Epsilon squared: the between-class share of the variance, minus what as many random groups would have. None
    unless there are at least two classes and more images than classes."""
    images, kept = int(counts.sum()), counts > 0
    groups = int(kept.sum())
    total = float(variance.sum()) * images
    if groups < 2 or images <= groups or total == 0:
        return None
    squares = (of_class - mean).square().sum(dim=(1, 2))
    between = float((squares * counts)[kept].sum())
    within = (total - between) / (images - groups)
    return max((between - (groups - 1) * within) / total, 0.0)


def statistics(collected: Collected) -> list[LayerStatistics]:
    return [layer_statistics(name, sums) for name, sums in collected.layers.items()]


def by_warehouse(layers: list[LayerStatistics]) -> dict[str, list[LayerStatistics]]:
    """The layers of each warehouse in the order of its cells; warehouses in the order in which images pass them."""
    made: dict[str, list[LayerStatistics]] = {}
    for layer in layers:
        made.setdefault(layer.warehouse, []).append(layer)
    return {name: sorted(members, key=lambda layer: layer.sums.share.start) for name, members in made.items()}


def warehouse_values(members: list[LayerStatistics]) -> dict[str, float | None]:
    """`MEANINGS` of a warehouse: the mean over the mixtures of all its layers."""
    weights = [len(layer.shift) for layer in members]
    made: dict[str, float | None] = {}
    for key in MEANINGS:
        values = [getattr(layer, key) for layer in members]
        total = sum(v * w for v, w in zip(values, weights, strict=True)) if None not in values else None
        made[key] = None if total is None else total / sum(weights)
    return made


def usage(members: list[LayerStatistics]) -> Tensor:
    """How much each cell is used, `(n,)`: the mean absolute attention of all mixtures to it, 1 for equal use."""
    total = sum(layer.sums.absolute[:, :-1].sum(dim=0) for layer in members)
    assert isinstance(total, Tensor)
    return total / total.mean().clamp(min=1e-12)
