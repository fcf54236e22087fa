"""Evaluation: every sample counted once, whatever the number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import nn

from train.data import Sample
from train.distributed import World

TOP = (1, 5)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable[Sample], world: World, cast: contextlib.AbstractContextManager[object]
) -> dict[str, float]:
    """Accuracies in percent, mean cross entropy, and the number of samples behind them.

    With fewer than five classes, top-5 counts every sample.
    """
    training = model.training
    model.eval()
    totals = torch.zeros(2 + len(TOP), dtype=torch.float64, device=world.device)  # samples, loss, hits at 1 and 5
    for images, targets, _ in loader:
        images, targets = (t.to(world.device, non_blocking=True) for t in (images, targets))
        with cast:
            logits = model(images)
        logits = logits.float()
        ranks = logits.topk(min(max(TOP), logits.shape[1]), dim=1).indices == targets[:, None]
        hits = [ranks[:, :k].sum() for k in TOP]
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        totals += torch.stack([torch.full_like(loss, len(targets)), loss, *hits]).double()
    model.train(training)
    samples, loss, *hits = world.sum(totals).tolist()
    percent = {f"top{k}": 100 * hit / samples for k, hit in zip(TOP, hits, strict=True)}
    return {**percent, "eval_loss": loss / samples, "eval_samples": samples}
