"""What a KernelWarehouse backbone costs in a detector: a training step and an inference, against the vanilla one's.

    python -m scripts.bench.detection                    Mask R-CNN, ResNet50 at n = 1, 320 x 256 pixels
    python -m scripts.bench.detection --config mask_rcnn_kw1x_convnext_tiny_1x_coco --size 512 640 --device cuda

Both have the same images, objects and heads. The figures are ratios of medians.
"""

from __future__ import annotations

from functools import partial

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from detection.compose import find
from detection.run import calm
from scripts.arguments import argument_parser
from scripts.bench.timing import in_turns, medians

WARM_UP = 2


def main() -> None:
    parser = argument_parser("bench.detection", __doc__)
    parser.add_argument("--config", default="mask_rcnn_kw1x_resnet50_1x_coco", help="in detection/configs/, or a path")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2, help="images of a training step: 2; an inference has one")
    parser.add_argument("--steps", type=int, default=10, help=f"of each kind, after {WARM_UP} to warm up: 10")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    calm()
    init_default_scope("mmdet")
    cfg = Config.fromfile(find(options.config))
    detectors = {n: detector(cfg, n).to(options.device) for n in ("static", cfg.model.backbone.n)}
    torch.manual_seed(0)
    shape = [3, *options.size]
    batch = demo_mm_inputs(options.batch, [shape] * options.batch, num_classes=80, with_mask=True)
    print(f"{options.config}, {options.size[0]} x {options.size[1]} pixels, {options.device}")
    for kind, step, images in (("training step", train, batch), ("inference", infer, one_of(batch))):
        runs = {n: partial(step, built, images) for n, built in detectors.items()}
        static, dynamic = medians(in_turns(runs, options.steps, warm_up=WARM_UP))
        print(f"{kind}: static {1000 * static:.0f} ms, n={cfg.model.backbone.n} {1000 * dynamic:.0f} ms: ", end="")
        print(f"{dynamic / static:.2f} times")


def detector(cfg: Config, n: str) -> nn.Module:
    model = cfg.model.copy()
    model.backbone = {**model.backbone, "n": n}
    model.test_cfg.rcnn.score_thr = 0.0  # as many detections in either
    built: nn.Module = MODELS.build(model)
    return built


def one_of(batch: dict[str, list[object]]) -> dict[str, list[object]]:
    return {key: values[:1] for key, values in batch.items()}


def train(model: nn.Module, batch: dict[str, list[object]]) -> None:
    """Forward, backward, without the update, which is the same for both."""
    model.train()
    losses, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))
    losses.backward()
    model.zero_grad()


@torch.no_grad()
def infer(model: nn.Module, batch: dict[str, list[object]]) -> None:
    model.eval()
    model(**model.data_preprocessor(batch, False), mode="predict")


if __name__ == "__main__":
    main()
