"""Models for other runtimes: ONNX, torch.export (.pt2), and AOTInductor. Batch and, where the model allows, image size
may vary. Each file is read again and checked against the model at batches of 1, 3 and 8.

>>> kw.export.onnx(model, "model.onnx", torch.randn(2, 3, 224, 224))
"""

from kw.export.check import Exported, ExportError
from kw.export.to_onnx import onnx
from kw.export.to_program import compiled, program

__all__ = ["ExportError", "Exported", "compiled", "onnx", "program"]
