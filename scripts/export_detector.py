"""Backbone and neck of a trained detector as ONNX: from images to the feature maps that its heads read.

    python -m scripts.export_detector RUN_FOLDER maps.onnx

Takes the run's configuration and newest checkpoint. The file has the input "input" (B, 3, H, W), images as the
detector's preprocessor normalizes them, and the outputs "output_0", "output_1" and so on, finest first. Batch and image
size may vary; sizes are multiples of what the detector pads to (32). Heads, the selection of boxes and the cutting out
of regions are not in it: mmdeploy converts complete detectors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import kw
from detection import loading
from detection.run import calm, quiet
from scripts.arguments import argument_parser
from scripts.draw_detections import load_detector
from train.jobs.errors import RunError


def main() -> None:
    parser = argument_parser("export_detector", __doc__)
    parser.add_argument("run", type=Path, help="a run folder of python -m detection")
    parser.add_argument("file", type=Path, help="the .onnx file to write")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 160), metavar=("HEIGHT", "WIDTH"),
                        help="of the images to check the file with (default: 128 160)")  # fmt: skip
    parser.add_argument("--half", action="store_true", help="float16 weights")
    options = parser.parse_args()
    calm()
    loading.install()
    try:
        with quiet():
            detector, _ = load_detector(options.run)
        maps = nn.Sequential(detector.backbone, detector.neck)
        example = torch.randn(2, 3, *options.size)
        print(kw.export.onnx(maps, options.file, example, half=options.half))
    except (RunError, kw.export.ExportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
