"""Models that are only evaluated, made of the dynamic or the static one: frozen, with narrow cells, in onnxruntime."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kw
from kw.export.to_onnx import runner

FREEZE: dict[str, dict[str, Any]] = {
    "frozen": {},
    "frozen+bfloat16": {"dtype": torch.bfloat16},
    "frozen+int8": {"dtype": torch.int8},
}
ONNX = ("onnx", "onnx+frozen", "onnx+static")
EVALUATED = (*FREEZE, *ONNX)


class Runtime(nn.Module):
    """A model in onnxruntime, on the CPU."""

    def __init__(self, model: nn.Module, example: Tensor, threads: int):
        super().__init__()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            kw.export.onnx(model, path, example, check=False)
            self.run = runner(path, threads)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.run((x,))[0]
        return out


def evaluated(name: str, dynamic: nn.Module, static: nn.Module, example: Tensor, threads: int) -> nn.Module:
    """The model of one of `EVALUATED`."""
    model = copy.deepcopy(static if name == "onnx+static" else dynamic).eval()
    if name in FREEZE or name == "onnx+frozen":
        kw.freeze(model, **FREEZE.get(name, {}))
    return Runtime(model, example, threads) if name in ONNX else model
