"""Other dynamic convolutions, to compare with. They are conversions of vanilla models, like `kw.convert`.

>>> model = kw.baselines.convert(timm.create_model("resnet18"), "odconv", n=4)
>>> model = kw.create_model("resnet18", dynamic="odconv", n=4)

A method is one file of this folder, which defines a layer and registers it (registry.py). Then `kw.create_model`,
`python -m train dynamic=NAME`, the report and the benchmark know it without further changes.
"""

from importlib import import_module
from pkgutil import iter_modules

from kw.baselines.conversion import convert, default_scope
from kw.baselines.layer import DynamicConv2d, KernelBank
from kw.baselines.registry import BASELINES, Baseline, check_budget, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "BASELINES",
    "Baseline",
    "DynamicConv2d",
    "KernelBank",
    "check_budget",
    "convert",
    "default_scope",
    "register",
]
