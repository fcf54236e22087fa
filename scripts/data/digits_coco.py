"""Real digits as a detection data set in COCO's format, with masks: python -m scripts.data.digits_coco FOLDER

scikit-learn's handwritten digits (8 x 8 pixels) are enlarged and placed on gray canvases without overlap. Digits of the
evaluation split are only in `val2017`. The folder has COCO's layout, for `data.root=FOLDER`. The same settings give the
same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from scripts.arguments import argument_parser
from train.data.digits import Digits

SPLITS = {"train2017": "train", "val2017": "val"}  # COCO's names for Digits' splits
Array = np.ndarray[Any, Any]
INK = 80  # a pixel this much darker than paper belongs to the digit


def main() -> None:
    parser = argument_parser("data.digits_coco", __doc__)
    parser.add_argument("out", type=Path, help="folder for annotations/, train2017/, val2017/")
    parser.add_argument("--images", type=int, nargs=2, default=(400, 80), help="to train and to evaluate: 400 80")
    parser.add_argument("--size", type=int, default=128, help="of the canvases, in pixels: 128")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for (folder, split), count in zip(SPLITS.items(), options.images, strict=True):
        rng = np.random.default_rng([options.seed, split == "val"])
        made = make_split(options.out, folder, Digits(split), count, options.size, rng)
        print(f"{folder}: {len(made['images'])} images, {len(made['annotations'])} digits")


def make_split(
    out: Path, folder: str, digits: Digits, count: int, size: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Write `count` images to `out/folder`, and their annotations, which are returned."""
    (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(digits.classes)]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for number in range(count):
        canvas, placed = compose(digits, size, rng)
        name = f"{number:06d}.png"
        Image.fromarray(canvas).save(out / folder / name)
        content["images"].append({"id": number + 1, "file_name": name, "width": size, "height": size})
        for target, mask in placed:
            identity = len(content["annotations"]) + 1
            content["annotations"].append({"id": identity, "image_id": number + 1, **annotation(target, mask)})
    (out / "annotations" / f"instances_{folder}.json").write_text(json.dumps(content))
    return content


def compose(digits: Digits, size: int, rng: np.random.Generator) -> tuple[Array, list[tuple[int, Array]]]:
    """A canvas `(size, size, 3)` with some digits, and the class and mask `(size, size)` of each."""
    paper = rng.integers(150, 240)
    canvas = np.clip(rng.normal(paper, 8, (size, size)), 0, 255)
    taken = np.zeros((size, size), bool)
    placed = []
    for _ in range(rng.integers(1, 12)):  # some find no free place
        image, target = digits.load(int(rng.integers(len(digits))))
        side = int(rng.integers(size // 6, size // 3))
        ink = np.asarray(image.convert("L").resize((side, side), Image.Resampling.BICUBIC), float)  # (side, side)
        y, x = rng.integers(0, size - side, 2)
        window = np.s_[y : y + side, x : x + side]
        if taken[window].any():
            continue
        canvas[window] -= ink * paper / 255
        mask = np.zeros((size, size), bool)
        mask[window] = ink > INK
        taken[window] = True
        placed.append((target, mask))
    gray = np.clip(canvas, 0, 255).astype(np.uint8)
    return np.stack([gray] * 3, axis=2), placed


def annotation(target: int, mask: Array) -> dict[str, Any]:
    """An object in COCO's format, its mask run-length encoded."""
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    box = [float(value) for value in coco_mask.toBbox(runs)]  # x, y, width, height
    area = float(coco_mask.area(runs))
    counts = {"size": list(runs["size"]), "counts": runs["counts"].decode()}
    return {"category_id": target + 1, "bbox": box, "area": area, "iscrowd": 0, "segmentation": counts}


if __name__ == "__main__":
    main()
