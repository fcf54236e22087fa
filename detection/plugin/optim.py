"""Learning rates of ConvNeXt in a detector, as its authors set them: lower in each of `num_layers` earlier groups."""

from __future__ import annotations

import re
from typing import Any

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from detection.plugin.errors import SettingError
from kw.layers import KWLayer

BLOCKS_PER_GROUP = 3  # of the third stage


def group_of(name: str, num_layers: int) -> int:
    """The group of a parameter of the detector, by its name: 0 for the stem, 1 and 2 for the first two stages, 3 and up
    for the third, in threes of blocks, `num_layers` for the fourth; `num_layers + 1` outside the backbone's stages."""
    if name.startswith("backbone.model.stem."):
        return 0
    match = re.match(r"backbone\.model\.stages\.(\d+)\.(?:downsample|blocks\.(\d+))", name)
    if match is None:
        return num_layers + 1
    stage, block = int(match[1]), int(match[2] or 0)
    return (1, 2, 3 + block // BLOCKS_PER_GROUP, num_layers)[stage]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ConvNeXtLayerDecay(DefaultOptimWrapperConstructor):
    """`paramwise_cfg=dict(decay_rate=0.95, num_layers=6)`: the rate of group g is `decay_rate ** (num_layers + 1 - g)`
    of the optimizer's. No weight decay on biases and one-dimensional parameters.

    A warehouse's cells have the rate of the deepest layer that uses them.

    Raises:
        SettingError: the backbone is not a KWBackbone with a ConvNeXt.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        if type(getattr(getattr(module, "backbone", None), "model", None)).__name__ != "ConvNeXt":
            raise SettingError("optim_wrapper.constructor=ConvNeXtLayerDecay needs a KWBackbone with a ConvNeXt.")
        num_layers, rate = self.paramwise_cfg["num_layers"], self.paramwise_cfg["decay_rate"]
        of_cells: dict[nn.Parameter, int] = {}
        for name, layer in module.named_modules():
            if isinstance(layer, KWLayer):
                cells = layer.warehouse.cells
                of_cells[cells] = max(group_of(f"{name}.", num_layers), of_cells.get(cells, 0))
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            group = of_cells.get(parameter, group_of(name, num_layers))
            decayed = parameter.dim() > 1 and not name.endswith(".bias")
            scale = rate ** (num_layers + 1 - group)
            settings = {"params": [], "lr": self.base_lr * scale, "weight_decay": self.base_wd if decayed else 0.0}
            groups.setdefault((group, decayed), settings)["params"].append(parameter)
        params.extend(groups[key] for key in sorted(groups))
