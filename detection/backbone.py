"""A backbone for MMDetection: any timm model, vanilla or converted, as the feature maps that a neck takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import kw
from detection.pretrained import load_classifier
from kw.attention import Attention
from kw.config import STATIC
from kw.layers import KWLayer
from kw.replace import drop_unused_warehouses
from train.jobs.errors import ConfigError

Settings = Mapping[str, Any] | None


def build_classifier(name: str, n: Any, settings: Settings, kwargs: Settings, **more: Any) -> nn.Module:
    """The whole classification model: one of `kw.backbones` as published, any other of timm's by the default scope.

    Raises:
        ConfigError: timm has no such model or does not take `kwargs`, or the kernels cannot be cut as asked.
    """
    settings, kwargs = dict(settings or {}), {**(kwargs or {}), **more}
    n = STATIC if n is None else n
    try:
        return kw.create_model(name, n=n, **settings, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"KWBackbone: {name} cannot be built at n={n}: {error}") from error


def feature_channels(name: str, out_indices: Sequence[int], kwargs: Settings = None) -> list[int]:
    """Channels of the maps of `KWBackbone(name=name, out_indices=out_indices, kwargs=kwargs)`: a neck's `in_channels`.

    Raises:
        ConfigError: the model has no such feature.
    """
    with torch.device("meta"):  # nothing is computed
        return [info["num_chs"] for info in _features(build_classifier(name, STATIC, None, kwargs), out_indices)]


def _features(model: Any, out_indices: Sequence[int]) -> list[dict[str, Any]]:
    """timm's account of each feature. One more than it lists is what the classifier would pool: in MobileNetV2 the
    1,280 channels of the last convolution, where the last one listed has 320."""
    known = [*model.feature_info, {"num_chs": model.num_features, "reduction": model.feature_info[-1]["reduction"]}]
    if not out_indices or list(out_indices) != sorted(set(out_indices) & set(range(len(known)))):
        told = ", ".join(f"{i} ({info['num_chs']} channels, 1/{info['reduction']})" for i, info in enumerate(known))
        raise ConfigError(f"out_indices={tuple(out_indices)}: this {type(model).__name__} has, in this order, {told}.")
    return [known[index] for index in out_indices]


@MODELS.register_module()
class KWBackbone(BaseModule):
    """Images `(B, 3, H, W)` to a tuple of feature maps `(B, channels[i], H / strides[i], W / strides[i])`.

    Args:
        name: a timm model, such as resnet50; those of `kw.backbones` have the published warehouses.
        n: the budget, "1/4", 1, 4; "static" or None for the vanilla model.
        out_indices: which of timm's features, counted as in its `feature_info`; one more than the last of them is what
            the classifier would pool.
        frozen_stages: 0 freezes the stem, k the first k stages too: no gradient, evaluation mode. Cells that a frozen
            layer draws from are frozen for all, or its kernels would change. -1 freezes nothing.
        norm_eval: keep all batch norms, those of attentions too, in evaluation mode: they are those of the checkpoint.
            "attention": only those of attentions, for training without a checkpoint on few images a device.
        out_norm: a LayerNorm for each map, for models whose stages do not end in a norm (ConvNeXt, ViT).
        drop_path: rate at which residual branches are dropped.
        kw: settings of `kw.KWConfig` in place of the published ones.
        kwargs: passed on to timm.create_model.
        init_cfg: `dict(type="Pretrained", checkpoint=PATH)`, a classification checkpoint (detection/pretrained.py).

    The temperature is 0: detection fine-tunes what classification has warmed up.

    Raises:
        ConfigError: the model cannot be built so, has no such features, or cannot give them.
    """

    model: Any  # timm's
    channels: list[int]
    strides: list[int]
    _is_init: bool

    def __init__(
        self,
        name: str,
        n: Any = STATIC,
        out_indices: Sequence[int] = (1, 2, 3, 4),
        frozen_stages: int = -1,
        norm_eval: bool | Literal["attention"] = False,
        out_norm: bool = False,
        drop_path: float = 0.0,
        kw: Settings = None,
        kwargs: Settings = None,
        init_cfg: dict[str, Any] | None = None,
    ):
        super().__init__(init_cfg)
        self.name, self.n = name, STATIC if n is None else n
        self.built_with = (name, n, kw, {**(kwargs or {}), **({"drop_path_rate": drop_path} if drop_path else {})})
        self.model = build_classifier(*self.built_with, num_classes=0)
        features = _features(self.model, out_indices)
        self.channels = [info["num_chs"] for info in features]
        self.strides = [info["reduction"] for info in features]
        self.norm_eval = norm_eval
        self._cut_off(out_indices)
        self.out_norms = nn.ModuleList(LayerNorm2d(c) if out_norm else nn.Identity() for c in self.channels)
        self._freeze(frozen_stages)

    def _cut_off(self, out_indices: Sequence[int]) -> None:
        """Remove what lies behind the last feature, and warehouses that nothing draws from any more."""
        if not hasattr(self.model, "forward_intermediates"):
            raise ConfigError(f"KWBackbone: timm's {self.name} has no forward_intermediates, so no feature maps.")
        last = len(self.model.feature_info)
        self.pooled = last in out_indices  # what the classifier would pool is asked for
        self.indices = [index for index in out_indices if index < last]
        if not self.pooled:
            self.model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
            drop_unused_warehouses(self.model)

    def _freeze(self, stages: int) -> None:
        in_layers = [entry for entry in self.model.named_parameters() if not entry[0].startswith("warehouses.")]
        groups = group_with_matcher(iter(in_layers), self.model.group_matcher(coarse=True), return_values=True)
        if not -1 <= stages < len(groups):
            raise ConfigError(f"frozen_stages={stages}: {self.name} has a stem (0) and stages 1 to {len(groups) - 1}.")
        for group in sorted(groups)[: stages + 1]:
            for parameter in groups[group]:
                parameter.requires_grad_(False)
        for layer in self.model.modules():
            if isinstance(layer, KWLayer) and not any(p.requires_grad for p in layer.parameters()):
                layer.warehouse.cells.requires_grad_(False)

    def train(self, mode: bool = True) -> KWBackbone:
        """Training mode, but for what is frozen and for what `norm_eval` names."""
        super().train(mode)
        for module in self.model.modules():
            own = [parameter.requires_grad for parameter in module.parameters()]
            if (own and not any(own)) or (self.norm_eval is True and isinstance(module, _BatchNorm)):
                module.eval()
            if self.norm_eval == "attention" and isinstance(module, Attention):
                module.norm.eval()
        return self

    def init_weights(self) -> None:
        """Load the classification checkpoint of `init_cfg`. timm and kw have initialized everything else already.

        Raises:
            CheckpointError: it cannot be read, or does not fit; the message names what is missing or left over.
        """
        if self.init_cfg and not self._is_init:
            load_classifier(self.model, lambda **more: build_classifier(*self.built_with, **more), self.init_cfg)
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.model.forward_intermediates(x, indices=self.indices, intermediates_only=not self.pooled)
        maps = [*found[1], found[0]] if self.pooled else found
        return tuple(norm(feature) for norm, feature in zip(self.out_norms, maps, strict=True))
