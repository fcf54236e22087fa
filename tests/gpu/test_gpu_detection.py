"""Training steps of Mask R-CNN with a KW backbone on a GPU, on generated images; in float32 and with autocast."""

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import torch
from helpers.implementations import force
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from detection.compose import CONFIGS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["mask_rcnn_kw1x_digits", "mask_rcnn_kw1x_resnet50_1x_coco"])
def test_a_step_of_mask_rcnn_lowers_its_loss_and_detects(name, precision, device, dry):
    if dry and (name.endswith("coco") or precision != "float32"):
        pytest.skip("too large for a CPU, or of GPUs alone, as MMEngine's autocast is")
    init_default_scope("mmdet")
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    detector = MODELS.build(cfg.model).to(device).train()
    size = 64 if dry else 256
    images = demo_mm_inputs(2, [[3, size, size]] * 2, num_classes=10, with_mask=True)
    if precision != "float32":
        cfg.optim_wrapper.update(type="AmpOptimWrapper", dtype=precision)
    wrapper = build_optim_wrapper(detector, cfg.optim_wrapper)
    losses = [detector.train_step(images, wrapper)["loss"].item() for _ in range(3 if dry else 8)]
    assert losses[-1] < losses[0], losses
    detector.eval()
    with torch.no_grad(), force("auto"):
        assert len(detector.test_step(images)) == 2
