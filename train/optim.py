"""Optimizer, parameter groups, mixup and loss of a recipe, from timm and torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_class, param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from train.config import RecipeConfig
from train.jobs.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]


def build_optimizer(model: nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """timm's optimizer, with weight decay on all but biases, one-dimensional parameters and what the model exempts.

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
        # A warehouse's cells have the rate of the first layer that uses them, by whose name they go.
        exempt: Collection[str] = getattr(model, "no_weight_decay", tuple)()
        parameters = param_groups_layer_decay(model, recipe.weight_decay, exempt, layer_decay=recipe.layer_decay)
    try:
        if has_fused(recipe.optimizer, next(model.parameters()).device):
            extra["fused"] = True
        optimizer = create_optimizer_v2(
            parameters,
            opt=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            **extra,
        )
    except Exception as error:  # optimizers raise different errors for a missing library or an unknown setting
        raise ConfigError(
            f"recipe.optimizer={recipe.optimizer!r} cannot be built here: {type(error).__name__}: {error}"
        ) from error
    _begin_momenta(optimizer)
    return optimizer


def has_fused(optimizer: str, device: torch.device) -> bool:
    """Whether torch has fused kernels for the optimizer. They skip a float16 step that overflows on the device; for
    other optimizers the scaler reads the overflow on the host, and so waits for the device in each step."""
    return device.type == "cuda" and get_optimizer_class(optimizer, bind_defaults=False) in (SGD, Adam, AdamW)


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that may come from another device. Whether kernels are fused stays as it is: the device decides."""
    groups = []
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        groups.append({**saved, "fused": own["fused"]} if "fused" in own else saved)
    optimizer.load_state_dict({**state, "param_groups": groups})
    _begin_momenta(optimizer)


def _begin_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Start SGD's momenta at zero, which gives the same first step as none. The fused kernel allocates them without
    writing them if the first step overflows, and they would keep what was in the memory (torch 2.11)."""
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def build_mixup(recipe: RecipeConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix within a micro-batch, from targets `(B,)` to shares `(B, num_classes)`; or None."""
    if recipe.mixup == recipe.cutmix == 0:
        return None
    smoothing = recipe.label_smoothing
    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=num_classes)  # type: ignore[no-untyped-call]


def build_loss(recipe: RecipeConfig, mixup: Mixup | None) -> Loss:
    """Cross entropy `(B, num_classes), targets -> ()`; mixup smooths labels itself."""
    if mixup:
        return SoftTargetCrossEntropy()  # type: ignore[no-untyped-call]
    return nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
