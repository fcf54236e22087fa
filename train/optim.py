"""Optimizer, loss and gradient scaling, from timm and torch, as a recipe sets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_class, param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from kw.layers import KWLayer
from train.config import RecipeConfig
from train.jobs.errors import ConfigError

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
    except Exception as error:  # each fails in its own way at a missing library or settings that it does not know
        raise ConfigError(
            f"recipe.optimizer={recipe.optimizer!r} cannot be built here: {type(error).__name__}: {error}"
        ) from error
    _begin_momenta(optimizer)
    return optimizer


def has_fused(optimizer: str, device: torch.device) -> bool:
    """Whether torch has fused kernels for it there. They pass over a float16 step that overflows by themselves; with
    other optimizers the scaler has to know it on the host, and waits for the device in each step."""
    return device.type == "cuda" and get_optimizer_class(optimizer, bind_defaults=False) in (SGD, Adam, AdamW)


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state, which may be of another device: whether the kernels are fused is this optimizer's to say."""
    groups = []
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        groups.append({**saved, "fused": own["fused"]} if "fused" in own else saved)
    optimizer.load_state_dict({**state, "param_groups": groups})
    _begin_momenta(optimizer)


def _begin_momenta(optimizer: torch.optim.Optimizer) -> None:
    """At zero, from where SGD's first step is the same as without. Its fused kernel does not write the momenta of a
    step that overflows; were that the first one, they would stay as the memory was (torch 2.11)."""
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


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
