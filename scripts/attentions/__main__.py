"""What the attentions of a trained model do on images: tables, and a page with heat maps as in the paper's figures.

    python -m scripts.attentions checkpoint=runs/digits/resnet_digits_kw1x/seed0      on the data set's own images
    python -m scripts.attentions checkpoint=RUN_OR_FILE data.root=FOLDER              the data set is elsewhere now
    python -m scripts.attentions checkpoint=RUN_OR_FILE images=FOLDER                 a folder of images, or of classes
    python -m scripts.attentions checkpoint=released.pth images=FOLDER backbone=resnet18 n=1/4

checkpoint   a run folder or a checkpoint's file; one of `python -m train` contains its configuration, of which data.*
             can be overridden; for a released one, name the model as for `python -m train`
images       a folder of images, or one with a folder for each class; without it, the data set's evaluation split
classes      at most this many classes, evenly spaced
per_class    at most this many images of each, evenly spaced
ema          true: the average of the weights
out          the folder to write: index.html, layers.csv, warehouses.csv, classes.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from scripts.attentions.collect import collect
from scripts.attentions.load import Options, batches, choose_images, load_model
from scripts.attentions.page import attentions_page, cell
from scripts.attentions.statistics import MEANINGS, LayerStatistics, by_warehouse, statistics, warehouse_values
from scripts.options import make_folder, one_line_errors, parse
from train.jobs.errors import writing


def main(words: list[str]) -> None:
    with one_line_errors():
        options, overrides = parse(Options, words, __doc__)
        model, config, name = load_model(options, overrides)
        classes, loads = choose_images(options, config)
        folder = make_folder(Path(options.out))
        collected = collect(model, batches(loads, config), classes)
    layers = statistics(collected)
    tau = float(next(layer for layer in model.modules() if hasattr(layer, "temperature")).temperature)
    subtitle = f"{collected.images} images of {len(classes)} class{'es' if len(classes) != 1 else ''}"
    subtitle += f"; temperature {tau:.2f}: not free of the anchors yet" if tau > 0 else ""
    text = attentions_page(f"The attentions of {name}", subtitle, layers, classes)
    with one_line_errors(), writing(folder):
        write_csv(layers, classes, folder)
        (folder / "index.html").write_text(text, encoding="utf-8")
    print(f"{name}: {subtitle}")
    for layer in layers:
        values = "  ".join(f"{key} {cell(getattr(layer, key))}" for key in MEANINGS)
        print(f"  {layer.name:<28} {layer.warehouse:<18} {values}")
    print(f"Written to {folder}: index.html, layers.csv, warehouses.csv, classes.csv")


def write_csv(layers: list[LayerStatistics], classes: list[str], folder: Path) -> None:
    """Statistics by layer, by warehouse, and by layer and class."""
    by_layer = [["layer", "warehouse", "mixtures", "cells", "owned", *MEANINGS]]
    for layer in layers:
        counts = [*layer.mean.shape, layer.sums.share.owned]
        by_layer.append([layer.name, layer.warehouse, *counts, *(getattr(layer, key) for key in MEANINGS)])
    warehouses = [["warehouse", "layers", "cells", *MEANINGS]]
    for name, members in by_warehouse(layers).items():
        warehouses.append([name, len(members), members[0].mean.shape[1], *warehouse_values(members).values()])
    by_class = [["layer", "warehouse", "class", "images", "moved", "distance"]]
    for layer in layers:
        counts = layer.sums.counts
        moved = layer.sums.moved.mean(dim=1) / counts.clamp(min=1)
        for k, name in enumerate(classes):
            values = (int(counts[k]), None if layer.moved is None else float(moved[k]), float(layer.classes[k]))
            by_class.append([layer.name, layer.warehouse, name, *values])
    for name, rows in (("layers", by_layer), ("warehouses", warehouses), ("classes", by_class)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
