"""The backbones of the paper: importing this package registers them with timm, as `kw_resnet18` and so on."""

from kw.backbones import convnext, deit, mobilenetv2, resnet
from kw.backbones.build import Backbone

BACKBONES: dict[str, Backbone] = {
    backbone.base: backbone
    for backbone in (
        resnet.RESNET18,
        resnet.RESNET50,
        mobilenetv2.MOBILENETV2_100,
        mobilenetv2.MOBILENETV2_050,
        convnext.CONVNEXT_TINY,
        deit.DEIT_TINY,
        deit.DEIT_SMALL,
    )
}

__all__ = ["BACKBONES", "Backbone"]
