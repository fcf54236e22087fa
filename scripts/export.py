"""A model folder from a checkpoint: weights, config.json and a model card; and the model for other runtimes.

    python -m scripts.export checkpoint=runs/digits/resnet_digits_kw1x/seed0 to=FOLDER
    python -m scripts.export checkpoint=RUN_OR_FILE to=FOLDER formats=onnx,program
    python -m scripts.export checkpoint=released.pth to=FOLDER backbone=resnet18 n=1/4

checkpoint   a run folder, a checkpoint's file, or a model folder that was exported before; one of `python -m train`
             contains its configuration; for a released one, name the model as for `python -m train`
to           the folder to write; `kw.load(FOLDER)` and `timm.create_model("local-dir:FOLDER", pretrained=True)` read it
formats      besides, of the same model frozen (`kw.freeze`): onnx (model.onnx), program (model.pt2, torch.export),
             aoti (model_aoti.pt2, compiled for this machine by AOTInductor)
half         true: ONNX has float16 weights and computes in float16
ema          false: the weights themselves, where there is an average of them, which is taken otherwise
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kw
from kw.layers import KWLayer
from scripts.checkpoints import Opened, open_checkpoint
from scripts.options import make_folder, one_line_errors, parse
from train.jobs.errors import CheckpointError, ConfigError, check
from train.jobs.metrics import MetricsFile

FORMATS = ("onnx", "program", "aoti")


@dataclass
class Options:
    """The command's own keys."""

    checkpoint: str = ""
    to: str = ""
    formats: str = ""  # of FORMATS, with commas
    half: bool = False
    ema: bool = True

    def __post_init__(self) -> None:
        check(bool(self.checkpoint), "checkpoint", self.checkpoint, "must be a run folder or a checkpoint's file")
        check(bool(self.to), "to", self.to, "must be the folder to write, such as to=models/mine")
        unknown = [name for name in self.names() if name not in FORMATS]
        check(not unknown, "formats", self.formats, f"there are {', '.join(FORMATS)}")
        check(not self.half or "onnx" in self.names(), "half", self.half, "is for formats=onnx")

    def names(self) -> list[str]:
        return [name for name in self.formats.strip("[]").replace(" ", "").split(",") if name]


def main(words: list[str]) -> None:
    with one_line_errors():
        options, overrides = parse(Options, words, __doc__)
        folder = Path(options.to).expanduser()
        if (Path(options.checkpoint).expanduser() / "config.json").is_file():
            model = _of_folder(options, overrides)
        else:
            model = _of_checkpoint(options, overrides, folder)
            print(f"Written to {folder}: model.safetensors, config.json, README.md")
        for name in options.names():
            try:
                print(_export(name, model, folder, options.half), flush=True)
            except (kw.export.ExportError, OSError) as error:
                raise CheckpointError(f"formats={name}: {error}") from None


def _of_folder(options: Options, overrides: list[str]) -> nn.Module:
    if overrides:
        raise ConfigError(f"{options.checkpoint} contains its own settings: leave {overrides[0]} out.")
    try:
        model = kw.load(options.checkpoint)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    make_folder(Path(options.to).expanduser())
    return model


def _of_checkpoint(options: Options, overrides: list[str], folder: Path) -> nn.Module:
    opened = open_checkpoint(options.checkpoint, overrides, None if options.ema else False)
    try:
        kw.save(
            opened.model,
            folder,
            classes=opened.classes,
            data=_data(opened),
            figures=_figures(opened),
            provenance=_provenance(opened),
        )
        return kw.load(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _data(opened: Opened) -> dict[str, Any]:
    """How `python -m train` prepares an image for evaluation."""
    data, augment = opened.config.data, opened.config.recipe.augment
    return {
        "input_size": (3, data.image_size, data.image_size),
        "mean": tuple(data.mean),
        "std": tuple(data.std),
        "interpolation": augment.eval_interpolation,
        "crop_pct": 224 / augment.eval_resize,
        "crop_mode": "center",
    }


def _figures(opened: Opened) -> dict[str, Any]:
    """What the run measured of these weights, and what they cost."""
    size = opened.config.data.image_size
    figures: dict[str, Any] = {"multiply-adds of an image": kw.profile(opened.model, (3, size, size)).macs}
    line = _line_of(opened)
    prefix = "ema_" if opened.averaged else ""
    for key, title in (("top1", "top-1 (%)"), ("top5", "top-5 (%)")):
        if prefix + key in line:
            figures[title] = round(float(line[prefix + key]), 2)
    if len(figures) > 1:
        figures["measured on"] = f"{opened.config.data.name}, {opened.config.data.eval_split}"
        figures["images"] = line.get("eval_samples")
    return figures


def _line_of(opened: Opened) -> dict[str, Any]:
    """The line of the run's metrics.jsonl that was measured with this checkpoint's weights; empty if there is none."""
    if opened.classes is None:
        return {}
    epoch, file = opened.state.get("epoch"), opened.path.parent.parent / "metrics.jsonl"
    if epoch is None or not file.is_file():
        return {}
    return next((line for line in MetricsFile(file).read() if line.get("epoch") == epoch), {})


def _provenance(opened: Opened) -> dict[str, Any]:
    config = opened.config
    if opened.classes is None:
        return {"made from": f"{opened.path.name}, a released checkpoint"}
    return {
        "made from": f"{config.name}, {opened.path.name}" + (", averaged weights" if opened.averaged else ""),
        "trained on": f"{config.data.name}, {_epochs(opened)}, seed {config.seed}",
        "trained by": "python -m train, of the KernelWarehouse framework",
    }


def _epochs(opened: Opened) -> str:
    """How long these weights were trained: "12 epochs", or of a checkpoint from before the end, "7 of 12 epochs"."""
    last, planned = opened.state.get("epoch"), opened.config.recipe.epochs  # the first epoch is 0
    epochs = "1 epoch" if planned == 1 else f"{planned} epochs"
    if last is None:  # saved within an epoch
        return f"{opened.state['step']} steps of {epochs}"
    return epochs if last + 1 == planned else f"{last + 1} of {epochs}"


def _export(name: str, model: nn.Module, folder: Path, half: bool) -> str:
    cfg: Any = model.pretrained_cfg
    example = torch.randn(2, *cfg["input_size"])
    frozen = copy.deepcopy(model)
    if any(isinstance(layer, KWLayer) for layer in frozen.modules()):
        kw.freeze(frozen)
    if name == "onnx":
        return str(kw.export.onnx(frozen, folder / "model.onnx", example, half=half))
    if name == "aoti":
        return str(kw.export.compiled(frozen, folder / "model_aoti.pt2", example))
    return str(kw.export.program(frozen, folder / "model.pt2", example))


if __name__ == "__main__":
    main(sys.argv[1:])
