"""What the attentions of a trained model do, on images: statistics, heat maps as in the paper's figures, and a page.

    python -m scripts.attentions checkpoint=runs/digits/resnet_digits_kw1x/seed0      the data set's own images
    python -m scripts.attentions checkpoint=RUN_OR_FILE images=FOLDER                 a folder of images, or of classes
    python -m scripts.attentions checkpoint=released.pth images=FOLDER backbone=resnet18 n=1/4

Keys: classes=10 and per_class=50, at most so many, at even distances; ema=true for the average of the weights;
out=report/attentions. Of a data set, the images are those of its evaluation split, cut as in evaluation.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from hydra.errors import HydraException

from scripts.attentions.collect import collect
from scripts.attentions.load import Options, batches, choose_images, load_model
from scripts.attentions.page import attentions_page
from scripts.attentions.pictures import draw_all
from scripts.attentions.statistics import MEANINGS, LayerStatistics, by_warehouse, statistics, warehouse_values
from train.jobs.errors import RunError


def main(words: list[str]) -> None:
    if not words or set(words) & {"-h", "--help"}:
        sys.exit(print(__doc__))
    try:
        options = Options.parse(words)
        model, config, _, name = load_model(options)
        classes, loads = choose_images(options, config)
        collected = collect(model, batches(loads, config), classes)
    except (RunError, HydraException) as error:
        sys.exit(str(error).splitlines()[0])
    layers = statistics(collected)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    tau = float(next(layer for layer in model.modules() if hasattr(layer, "temperature")).temperature)
    told = f"{collected.images} images of {len(classes)} class{'es' if len(classes) != 1 else ''}"
    told += f"; temperature {tau:.2f}: not free of the anchors yet" if tau > 0 else ""
    write_csv(layers, classes, folder)
    pictures = draw_all(layers, classes, folder)
    text = attentions_page(f"The attentions of {name}", told, layers, classes)
    (folder / "index.html").write_text(text, encoding="utf-8")
    print(f"{name}: {told}")
    for layer in layers:
        print(
            f"  {layer.name:<28} {layer.warehouse:<18} "
            + "  ".join(f"{k} {_number(getattr(layer, k))}" for k in MEANINGS)
        )
    print(f"Written to {folder}: index.html, layers.csv, warehouses.csv, classes.csv, {', '.join(pictures)}")


def write_csv(layers: list[LayerStatistics], classes: list[str], folder: Path) -> None:
    """Statistics by layer, by warehouse, and by layer and class."""
    with (folder / "layers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "warehouse", "mixtures", "cells", "owned", *MEANINGS])
        for layer in layers:
            counts = [*layer.mean.shape, layer.sums.share.owned]
            writer.writerow([layer.name, layer.warehouse, *counts, *(getattr(layer, key) for key in MEANINGS)])
    with (folder / "warehouses.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["warehouse", "layers", "cells", *MEANINGS])
        for name, drawing in by_warehouse(layers).items():
            writer.writerow([name, len(drawing), drawing[0].mean.shape[1], *warehouse_values(drawing).values()])
    with (folder / "classes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "warehouse", "class", "images", "moved", "distance"])
        for layer in layers:
            counts = layer.sums.counts
            moved = layer.sums.moved.mean(dim=1) / counts.clamp(min=1)
            for k, name in enumerate(classes):
                values = (int(counts[k]), None if layer.moved is None else float(moved[k]), float(layer.classes[k]))
                writer.writerow([layer.name, layer.warehouse, name, *values])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main(sys.argv[1:])
