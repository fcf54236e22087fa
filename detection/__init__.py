"""KernelWarehouse backbones in MMDetection 3: `custom_imports = dict(imports=["detection"])` makes them known.

Importing it registers `KWBackbone`, `SimplePyramid` and `ConvNeXtLayerDecay`, puts stand-ins in the place of mmcv's
compiled operators where those are missing, and has MMEngine read checkpoints without running what is in them.
"""

from detection import ops

ops.install()  # before MMDetection's models, which look for the operators when they are imported

from detection import backbone, loading, neck, optim, temperature  # noqa: E402

loading.install()

__all__ = ["backbone", "loading", "neck", "ops", "optim", "temperature"]
