"""Detections drawn on images: python -m scripts.draw_detections RUN_FOLDER PICTURE

Takes the run's configuration and newest checkpoint, detects on the first images of its evaluation set, and lays them
out in a grid, each object with its mask, its box, and its class and score.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from detection import loading
from detection.data import class_names
from detection.run import calm, quiet
from detection.saving import latest
from scripts.arguments import argument_parser
from scripts.options import make_folder
from train.jobs.errors import CheckpointError, RunError, writing

COLORS = [(214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207)]
MARGIN = 4  # pixels between images
TEXT = 12  # pixels above a box


def main() -> None:
    parser = argument_parser("draw_detections", __doc__)
    parser.add_argument("run", type=Path, help="a run folder of python -m detection")
    parser.add_argument("picture", type=Path, help="the image file to write")
    parser.add_argument("--images", type=int, default=8, help="number of images (default: 8)")
    parser.add_argument("--score", type=float, default=0.5, help="least score of detections to draw (default: 0.5)")
    parser.add_argument("--zoom", type=int, default=2, help="factor by which images are enlarged (default: 2)")
    options = parser.parse_args()
    calm()
    loading.install()
    try:
        make_folder(options.picture.parent)
        with quiet():
            images = list(detected(options.run, options.images, options.score, options.zoom))
        with writing(options.picture):
            grid(images).save(options.picture)
    except RunError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{len(images)} images in {options.picture}")


def load_detector(run: Path) -> tuple[Any, Any]:
    """The trained detector of a run folder, on the CPU, and its configuration.

    Raises:
        CheckpointError: the folder has no configuration, or no checkpoint.
    """
    from mmdet.apis import init_detector
    from mmengine.config import Config

    configuration = next(run.glob("*.py"), None)
    if configuration is None:
        raise CheckpointError(
            f"{run} has no configuration (*.py): name a folder in which python -m detection has trained an epoch."
        )
    checkpoint = latest(run)
    cfg = Config.fromfile(configuration)
    return init_detector(cfg, str(checkpoint), device="cpu"), cfg


def detected(run: Path, count: int, score: float, zoom: int) -> Any:
    """The first images of the evaluation set, with their detections drawn on them.

    Raises:
        CheckpointError: the folder has no configuration, or no checkpoint.
    """
    from mmdet.apis import inference_detector
    from mmdet.registry import DATASETS

    detector, cfg = load_detector(run)
    names = class_names(cfg.val_dataloader.dataset)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    for index in range(min(count, len(dataset))):
        path = dataset.get_data_info(index)["img_path"]
        found = inference_detector(detector, path).pred_instances
        found = found[found.scores >= score].numpy()
        yield draw(Image.open(path).convert("RGB"), found, names, zoom)


def draw(image: Image.Image, found: Any, names: list[str], zoom: int) -> Image.Image:
    """The enlarged image with masks, boxes, classes and scores."""
    pixels = np.asarray(image, float)
    for mask, label in zip(found.get("masks", []), found.labels, strict=False):
        pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array(COLORS[label % len(COLORS)])
    large = Image.fromarray(pixels.astype(np.uint8)).resize((image.width * zoom, image.height * zoom))
    pen = ImageDraw.Draw(large)
    for box, label, score in zip(found.bboxes * zoom, found.labels, found.scores, strict=True):
        color = COLORS[label % len(COLORS)]
        pen.rectangle([float(side) for side in box], outline=color)
        above = max(float(box[1]) - TEXT, 0.0)
        pen.text((float(box[0]), above), f"{names[label]} {score:.2f}", fill="black")
    return large


def grid(images: list[Image.Image]) -> Image.Image:
    """Images in a grid twice as wide as high."""
    columns = min(len(images), math.ceil(math.sqrt(2 * len(images))))
    width, height = (max(getattr(image, side) for image in images) + MARGIN for side in ("width", "height"))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


if __name__ == "__main__":
    main()
