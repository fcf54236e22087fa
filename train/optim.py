"""Optimizer, loss and gradient scaling, from timm and torch, as a recipe sets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

from kw.layers import KWLayer
from train.config import RecipeConfig
from train.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]


def build_optimizer(model: nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """Weight decay on all but biases, one-dimensional parameters and what the model itself exempts.

    Raises:
        ConfigError: timm cannot build this optimizer here, or not with these settings.
    """
    extra: dict[str, Any] = {}
    if recipe.optimizer == "sgd":
        extra["nesterov"] = recipe.nesterov
    else:
        extra |= {"betas": tuple(recipe.betas), "eps": recipe.eps}
    parameters: Any = model
    if recipe.layer_decay is not None:
        parameters = layer_decay_groups(model, recipe.weight_decay, recipe.layer_decay)
    try:
        return create_optimizer_v2(
            parameters,
            opt=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            **extra,
        )
    except Exception as error:  # each fails in its own way at a missing library or settings that it does not know
        raise ConfigError(
            f"recipe.optimizer={recipe.optimizer!r} cannot be built here: {type(error).__name__}: {error}"
        ) from error


def layer_decay_groups(model: nn.Module, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """timm's parameter groups, in which the learning rate of a layer is `decay` times that of the next one; but cells,
    which timm would put with the head, learn as fast as the deepest layer that draws from them."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups: list[dict[str, Any]] = param_groups_layer_decay(model, weight_decay, exempt, layer_decay=decay)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    by_cells: dict[nn.Parameter, float] = {}
    for layer in model.modules():
        if isinstance(layer, KWLayer):
            cells, scale = layer.warehouse.cells, scales[next(layer.attention.parameters())]
            by_cells[cells] = max(scale, by_cells.get(cells, 0.0))
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in by_cells]
    of_cells = [{"params": [cells], "lr_scale": by_cells[cells], "weight_decay": weight_decay} for cells in by_cells]
    return [group for group in groups if group["params"]] + of_cells


def build_mixup(recipe: RecipeConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix within a micro-batch, which turns targets `(B,)` into shares `(B, num_classes)`."""
    if recipe.mixup == recipe.cutmix == 0:
        return None
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=num_classes)


def build_loss(recipe: RecipeConfig, mixup: Mixup | None) -> Loss:
    """Cross entropy `(B, num_classes), targets -> ()`; mixup smooths labels itself."""
    return SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
