"""A backbone for MMDetection: the feature maps of any timm model, static or dynamic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import kw
from detection.plugin.errors import SettingError
from detection.plugin.pretrained import load_classifier
from kw.baselines.registry import BASELINES
from kw.config import KW, STATIC
from kw.layers import DynamicLayer, KWLayer
from kw.replace import drop_unused_warehouses

Settings = Mapping[str, Any] | None


def feature_channels(name: str, out_indices: Sequence[int], kwargs: Settings = None) -> list[int]:
    """Channels of the maps of `KWBackbone(name=name, out_indices=out_indices, kwargs=kwargs)`: a neck's `in_channels`.

    Raises:
        SettingError: timm has no such model, or the model has no such feature.
    """
    with torch.device("meta"):  # nothing is computed
        return [info["num_chs"] for info in _features(_classifier(name, n=STATIC, **(kwargs or {})), out_indices)]


def method_of(n: Any = None, dynamic: str | None = None) -> tuple[Any, str]:
    """n and method as `kw.create_model` takes them, of these arguments of `KWBackbone`.

    Raises:
        SettingError: the method needs a budget.
    """
    budget = dynamic == KW or (dynamic in BASELINES and BASELINES[dynamic].budget)
    if n is None and budget:
        raise SettingError(f"KWBackbone: dynamic={dynamic!r} needs a budget n, such as 4; or n='static'.")
    if n is None:
        n = STATIC if dynamic in (None, STATIC) else 1
    return n, dynamic or KW


def has_temperature(backbone: Mapping[str, Any]) -> bool:
    """Whether a backbone of these settings of `KWBackbone` has attentions whose temperature is warmed up.

    Raises:
        SettingError: it cannot be built.
    """
    n, dynamic = method_of(backbone.get("n"), backbone.get("dynamic"))
    settings = {**(backbone.get("warehouse") or {}), **(backbone.get("kwargs") or {})}
    with torch.device("meta"):  # nothing is computed
        return bool(kw.temperatures(_classifier(backbone["name"], n=n, dynamic=dynamic, **settings)))


def _classifier(name: str, **settings: Any) -> nn.Module:
    """`kw.create_model`, whose errors become SettingErrors."""
    try:
        return kw.create_model(name, **settings)
    except (TypeError, ValueError) as error:
        raise SettingError(f"KWBackbone: {name} cannot be built at n={settings['n']}: {error}") from error


def _features(model: Any, out_indices: Sequence[int]) -> list[dict[str, Any]]:
    """timm's description of each feature. One more than it lists is the input of the classifier's pooling: MobileNetV2
    has 1,280 channels there, after its last convolution, and 320 in the last feature that timm lists."""
    known = [*model.feature_info, {"num_chs": model.num_features, "reduction": model.feature_info[-1]["reduction"]}]
    if not out_indices or list(out_indices) != sorted(set(out_indices) & set(range(len(known)))):
        listed = ", ".join(f"{i} ({info['num_chs']} channels, 1/{info['reduction']})" for i, info in enumerate(known))
        raise SettingError(
            f"out_indices={tuple(out_indices)}: name, in ascending order, features of {type(model).__name__}: {listed}."
        )
    return [known[index] for index in out_indices]


@MODELS.register_module()
class KWBackbone(BaseModule):
    """Images `(B, 3, H, W)` to a tuple of feature maps `(B, channels[i], H / strides[i], W / strides[i])`.

    Args:
        name: a timm model, such as resnet50. Those of `kw.backbones` have the warehouses of the paper.
        n: the budget, "1/4", 1, 4; "static" for the vanilla model, which is also what None is without `dynamic`.
        dynamic: "kw", the default, or a method of `kw.baselines`, which has n kernels in a layer. Those without a
            budget, such as "fdconv", need no n.
        out_indices: indices into timm's `feature_info`. One more than its last is the input of the classifier's
            pooling.
        frozen_stages: 0 freezes the stem, k also the first k stages: no gradient, evaluation mode. Cells that a frozen
            layer uses are frozen for all layers, or its kernels would change. FDConv's attentions and bands train in
            frozen stages too, as in its release. -1 freezes nothing.
        norm_eval: True keeps all batch norms, those of attentions too, in evaluation mode, with the statistics of the
            checkpoint. "attention" keeps those of dynamic layers' attentions there, for training without a
            checkpoint on few images a device.
        out_norm: a LayerNorm for each map, for models whose stages do not end in a norm (ConvNeXt, ViT).
        drop_path: the rate at which residual branches are dropped.
        warehouse: fields of `kw.KWConfig` that override the published ones.
        kwargs: passed on to timm.create_model.
        init_cfg: `dict(type="Pretrained", checkpoint=PATH)`, a classification checkpoint; see
            `detection.plugin.pretrained.load_classifier`.

    The temperature is 0: detection fine-tunes a classification model whose warm-up is over.

    Raises:
        SettingError: the model cannot be built with these settings, or has no such features.
    """

    model: Any  # timm's
    channels: list[int]
    strides: list[int]
    _is_init: bool

    def __init__(
        self,
        name: str,
        n: Any = None,
        dynamic: str | None = None,
        out_indices: Sequence[int] = (1, 2, 3, 4),
        frozen_stages: int = -1,
        norm_eval: bool | Literal["attention"] = False,
        out_norm: bool = False,
        drop_path: float = 0.0,
        warehouse: Settings = None,
        kwargs: Settings = None,
        init_cfg: dict[str, Any] | None = None,
    ):
        super().__init__(init_cfg)
        self.n, method = method_of(n, dynamic)
        self.timms = {**(kwargs or {}), **({"drop_path_rate": drop_path} if drop_path else {})}
        self.name, self.settings = name, dict(n=self.n, dynamic=method, **(warehouse or {}), **self.timms)
        self.model = _classifier(name, **self.settings, num_classes=0)
        features = _features(self.model, out_indices)
        self.channels = [info["num_chs"] for info in features]
        self.strides = [info["reduction"] for info in features]
        self.norm_eval = norm_eval
        self._remove_head(out_indices)
        self.out_norms = nn.ModuleList(LayerNorm2d(c) if out_norm else nn.Identity() for c in self.channels)
        self._freeze(frozen_stages)

    def _whole(self, num_classes: int, static: bool) -> nn.Module:
        """The classification model of this backbone, or of the static one."""
        settings = {"n": STATIC, **self.timms} if static else self.settings
        return _classifier(self.name, **settings, num_classes=num_classes)

    def _remove_head(self, out_indices: Sequence[int]) -> None:
        """Remove what follows the last feature, and the warehouses that no other layer uses."""
        if not hasattr(self.model, "forward_intermediates"):
            raise SettingError(f"KWBackbone: timm's {self.name} has no forward_intermediates, so no feature maps.")
        last = len(self.model.feature_info)
        self.pooled = last in out_indices  # the input of the classifier's pooling is among the maps
        self.indices = [index for index in out_indices if index < last]
        if not self.pooled:
            self.model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
            drop_unused_warehouses(self.model)

    def _freeze(self, stages: int) -> None:
        matcher = self.model.group_matcher(coarse=True)
        group_of: dict[str, int] = group_parameters(self.model, matcher, reverse=True)
        last = max(group_of.values())
        if not -1 <= stages <= last:
            raise SettingError(f"frozen_stages={stages}: {self.name} has a stem (0) and stages 1 to {last}.")
        trained = tuple(
            f"{name}.{part}."
            for name, layer in self.model.named_modules()
            if isinstance(layer, DynamicLayer)
            for part in layer.trained_when_frozen
        )
        frozen = {name for name, group in group_of.items() if group <= stages}
        for name, parameter in self.model.named_parameters():
            if name in frozen and not name.startswith(trained):
                parameter.requires_grad_(False)
        self._in_evaluation: list[nn.Module] = []  # modules of frozen stages
        self._in_training: list[nn.Module] = []  # parts of these that are trained
        for name, module in self.model.named_modules():
            own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()} if name else {""}
            if own and own <= frozen:
                (self._in_training if f"{name}.".startswith(trained) else self._in_evaluation).append(module)
        for layer in self.model.modules():
            if isinstance(layer, KWLayer) and not any(p.requires_grad for p in layer.own_parameters()):
                layer.warehouse.cells.requires_grad_(False)

    def train(self, mode: bool = True) -> KWBackbone:
        """Training mode, except for what is frozen and for the norms that `norm_eval` names."""
        super().train(mode)
        for module in self._in_evaluation:
            module.eval()
        for module in self._in_training:
            module.train(mode)
        for module in self.model.modules():
            own = [parameter.requires_grad for parameter in module.parameters()]
            if (own and not any(own)) or (self.norm_eval is True and isinstance(module, _BatchNorm)):
                module.eval()
            if self.norm_eval == "attention" and isinstance(module, DynamicLayer) and module.attention is not None:
                for part in module.attention.modules():
                    if isinstance(part, _BatchNorm):
                        part.eval()
        return self

    def init_weights(self) -> None:
        """Load the classification checkpoint of `init_cfg`. timm and kw have initialized everything else already.

        Raises:
            PretrainedError: it cannot be read, or does not fit; the message names what is missing or left over.
        """
        if self.init_cfg and not self._is_init:
            load_classifier(self.model, self._whole, self.init_cfg)
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.model.forward_intermediates(x, indices=self.indices, intermediates_only=not self.pooled)
        maps = [*found[1], found[0]] if self.pooled else found
        return tuple(norm(feature) for norm, feature in zip(self.out_norms, maps, strict=True))
