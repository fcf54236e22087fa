"""The simple feature pyramid of ViTDet (arXiv 2203.16527, section 3): every level from a plain backbone's last map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from detection.plugin.errors import SettingError


@MODELS.register_module()
class SimplePyramid(BaseModule):
    """One map `(B, C, H / 16, W / 16)` to `num_outs` of `out_channels` at 1/4, 1/8, 1/16, 1/32, 1/64.

    Args:
        in_channels: C, in a list of one: a plain backbone has one map.
        num_outs: at least 4. Each map after the fourth is every second pixel of the one before.

    Raises:
        SettingError: there is more than one map, or num_outs is below 4.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, num_outs: int = 5, init_cfg: dict[str, Any] | None = None
    ):
        super().__init__(init_cfg)
        if len(in_channels) != 1 or num_outs < 4:
            raise SettingError(
                f"SimplePyramid makes at least 4 maps from one: num_outs={num_outs}, in_channels={list(in_channels)}."
            )
        c = in_channels[0]
        up = [nn.ConvTranspose2d(c, c // 2, 2, 2), LayerNorm2d(c // 2), nn.GELU()]
        resize = [
            nn.Sequential(*up, nn.ConvTranspose2d(c // 2, c // 4, 2, 2)),
            nn.ConvTranspose2d(c, c // 2, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2, 2),
        ]
        self.extra = num_outs - len(resize)
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(width, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for scale, width in zip(resize, (c // 4, c // 2, c, c), strict=True)
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        maps = [level(inputs[0]) for level in self.levels]
        for _ in range(self.extra):
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return tuple(maps)
