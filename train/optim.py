"""Optimizer, loss and gradient scaling, from timm and torch, as a recipe sets them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from train.config import RecipeConfig

Loss = Callable[[Tensor, Tensor], Tensor]


def build_optimizer(model: nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """Weight decay on all but biases, one-dimensional parameters and what the model itself exempts."""
    extra: dict[str, object] = {}
    if recipe.optimizer == "sgd":
        extra["nesterov"] = recipe.nesterov
    else:
        extra |= {"betas": tuple(recipe.betas), "eps": recipe.eps}
    return create_optimizer_v2(
        model,
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        layer_decay=recipe.layer_decay,
        **extra,
    )


def build_mixup(recipe: RecipeConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix within a micro-batch, which turns targets `(B,)` into shares `(B, num_classes)`."""
    if recipe.mixup == recipe.cutmix == 0:
        return None
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=num_classes)


def build_loss(recipe: RecipeConfig, mixup: Mixup | None) -> Loss:
    """Cross entropy `(B, num_classes), targets -> ()`; mixup smooths labels itself."""
    return SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
