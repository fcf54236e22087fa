"""The dynamic layers of a model, with their inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kw.layers import KWLayer


@torch.no_grad()
def visit_layers(model: nn.Module, image: Tensor, visit: Callable[[str, KWLayer, Tensor], None]) -> None:
    """Call `visit(name, layer, input)` for each dynamic layer in a forward pass."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, KWLayer)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: visit(name, layer, args[0].detach()))  # type: ignore[misc]
        for name, layer in layers
    ]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
