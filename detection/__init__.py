"""KernelWarehouse backbones in MMDetection 3.

`custom_imports = dict(imports=["detection"])` in a configuration registers what plugin/ holds: `KWBackbone`,
`SimplePyramid`, `ConvNeXtLayerDecay`, `TemperatureWarmup`, `ExactTrainLoop` and `LoadWholeImage`. It changes nothing
else. Where mmcv has no compiled operators, name `detection.torchvision_ops` before it. configs/ holds configurations,
for MMDetection's own tools and for `python -m detection`. The other files are that program.
"""

from detection.plugin.backbone import KWBackbone, feature_channels
from detection.plugin.exact import ExactTrainLoop
from detection.plugin.images import LoadWholeImage
from detection.plugin.neck import SimplePyramid
from detection.plugin.optim import ConvNeXtLayerDecay
from detection.plugin.temperature import TemperatureWarmup

__all__ = [
    "ConvNeXtLayerDecay",
    "ExactTrainLoop",
    "KWBackbone",
    "LoadWholeImage",
    "SimplePyramid",
    "TemperatureWarmup",
    "feature_channels",
]
