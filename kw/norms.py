"""BatchNorm of a frozen model, merged into the layer before it: in evaluation mode it is `y * a + b` for each channel.

Exact into

- a static layer, and a folded one: their kernels are the layer's own;
- a dynamic one that is alone in its warehouse and whose cells have all output channels: each row of a cell then belongs
  to one channel. Cells that several layers or several rows of a kernel share cannot have the scale of one.

Which norm follows which layer is read from torch.fx's graph. Where a model cannot be traced, all norms stay.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn

from kw.folding import FoldedLayer
from kw.layers import DynamicLayer, KWLayer
from kw.replace import plain_base

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (DynamicLayer, FoldedLayer, *NORMS))
        return leaf or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def merge_norms(model: nn.Module) -> int:
    """Merge each BatchNorm where that is exact, in place; how many were merged. The model is in evaluation mode."""
    pairs = _followed(model)
    for layer, norm in pairs.items():
        module, following = model.get_submodule(layer), model.get_submodule(norm)
        _scale(module, *_affine(following))
        parent, _, child = norm.rpartition(".")
        setattr(model.get_submodule(parent), child, getattr(following, "act", None) or nn.Identity())
    return len(pairs)


def _followed(model: nn.Module) -> dict[str, str]:
    """Layer name -> that of the norm that alone reads its output, where the norm can be merged."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # torch.fx raises nearly anything where it cannot follow
        return {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [str(node.target) for node in calls]
    found = {}
    for node in calls:
        reader = next(iter(node.users), None)
        if len(node.users) != 1 or reader is None or reader.op != "call_module":
            continue
        layer, norm = str(node.target), str(reader.target)
        once = targets.count(layer) == targets.count(norm) == 1
        if once and _can_merge(model.get_submodule(layer), model.get_submodule(norm)):
            found[layer] = norm
    return found


def _can_merge(layer: nn.Module, norm: nn.Module) -> bool:
    if type(norm) not in NORMS or norm.running_mean is None or _is_watched(norm) or _is_watched(layer):
        return False
    if isinstance(layer, FoldedLayer):
        return not isinstance(norm, nn.BatchNorm1d)
    if isinstance(layer, KWLayer):
        alone = len(layer.warehouse.shares) == 1 and layer.share.grid[1] == 1
        return alone and not isinstance(norm, nn.BatchNorm1d)
    return plain_base(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks on the module see its input or output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """a and b, in double precision."""
    a = (norm.running_var.double() + norm.eps).rsqrt()
    a = a if norm.weight is None else a * norm.weight.double()
    b = -norm.running_mean.double() * a
    return a, b if norm.bias is None else b + norm.bias.double()


def _scale(layer: Any, a: Tensor, b: Tensor) -> None:
    """Multiply the layer's output by a, and add b."""
    if isinstance(layer, FoldedLayer):
        kernel, (positions, rows, columns) = layer.basis, layer.geometry.grid
        by_grid = kernel.view(len(kernel), positions, rows, columns, *kernel.shape[2:])
        by_grid.copy_(by_grid.double() * a.view(1, 1, rows, 1, -1, 1))
    elif isinstance(layer, KWLayer):
        layer.warehouse.cells.copy_(layer.warehouse.cells.double() * a[:, None])
    else:
        layer.weight.copy_(layer.weight.double() * a.view(-1, *(1,) * (layer.weight.dim() - 1)))
    kind = next(layer.parameters())
    old = 0 if layer.bias is None else layer.bias.double() * a
    layer.bias = nn.Parameter((old + b).to(kind), requires_grad=False)
