"""KernelWarehouse (ICML 2024, arXiv 2406.07879) as a conversion of vanilla models.

>>> import kw, timm
>>> model = kw.create_model("resnet18", n="1/4", num_classes=1000)
>>> model = kw.convert(timm.create_model("regnety_002"), config=kw.KWConfig(n="1/2"))
"""

import kw.hub  # noqa: F401  # registers "kernelwarehouse" in timm
from kw import backbones, baselines, export, functional
from kw.config import KWConfig
from kw.conversion import convert
from kw.create import create_model
from kw.folder import FolderError, load, save
from kw.freezing import freeze
from kw.from_static import load_static
from kw.layers import KWConv1d, KWConv2d, KWConv3d, KWLinear
from kw.planning import Plan, plan
from kw.profiling import Profile, profile
from kw.released import load_released, to_released
from kw.temperature import set_temperature, temperatures
from kw.warehouse import KernelShape, Warehouse

__version__ = "0.1.0"

__all__ = [
    "FolderError",
    "KWConfig",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWLinear",
    "KernelShape",
    "Plan",
    "Profile",
    "Warehouse",
    "backbones",
    "baselines",
    "convert",
    "create_model",
    "export",
    "freeze",
    "functional",
    "load",
    "load_released",
    "load_static",
    "plan",
    "profile",
    "save",
    "set_temperature",
    "temperatures",
    "to_released",
]
