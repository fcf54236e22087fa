"""The configurations of detection/: their settings beside the published ones, and each of them at work, shrunk."""

import copy
import functools
from pathlib import Path

import mmdet
import pytest
import torch
import yaml
from helpers.programs import ROOT
from helpers.selection import representative
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from detection import feature_channels, torchvision_ops  # noqa: F401  so that mmcv has operators
from detection.compose import CONFIGS
from detection.plugin.errors import SettingError
from detection.plugin.optim import group_of
from kw.attention import Attention
from kw.config import format_budget
from kw.layers import KWLayer
from scripts.report.published import DETECTION, published

NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
ROWS = yaml.safe_load((ROOT / "scripts/report/published.yaml").read_text())["coco"]
SIZES = [(short, 1333) for short in range(480, 801, 32)]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmdet")


@functools.cache
def read(name):
    return Config.fromfile(CONFIGS / f"{name}.py")


def load(name):
    """MMEngine looks through an index of 300 files for those of MMDetection, so that each is read once."""
    return copy.deepcopy(read(name))


def config_name(detector, row):
    budget = f"kw{format_budget(row['n'])}_" if row["n"] else ""
    return f"{detector}_{budget}{row['backbone']}_1x_coco"


@pytest.mark.parametrize("detector", ["mask_rcnn", "faster_rcnn"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_a_published_row_is_set_as_published(row, detector):
    cfg = load(config_name(detector, row))
    backbone, convnext = cfg.model.backbone, row["backbone"] == "convnext_tiny"
    assert cfg.model.type == {"mask_rcnn": "MaskRCNN", "faster_rcnn": "FasterRCNN"}[detector]
    assert (backbone.type, backbone.name, backbone.n) == ("KWBackbone", row["backbone"], row["n"] or "static")
    assert cfg.model.neck.type == "FPN"
    assert cfg.model.neck.in_channels == feature_channels(backbone.name, backbone.out_indices)
    if row["backbone"] == "mobilenetv2_100":
        assert cfg.model.neck.in_channels == [24, 32, 96, 1280]
    assert cfg.train_cfg.max_epochs == 12
    warmup, steps = cfg.param_scheduler
    assert (warmup.type, warmup.begin, warmup.end, warmup.by_epoch) == ("LinearLR", 0, 500, False)
    assert (steps.type, steps.milestones, steps.gamma) == ("MultiStepLR", [9, 11] if convnext else [8, 11], 0.1)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-4, 0.05)
    if convnext:
        assert (backbone.drop_path, backbone.kwargs.ls_init_value) == (0.4, 1.0)
        assert dict(cfg.optim_wrapper.paramwise_cfg) == {"decay_rate": 0.95, "num_layers": 6}
        assert backbone.get("frozen_stages", -1) == -1
    else:
        assert (backbone.frozen_stages, backbone.norm_eval) == (1, True)
        assert dict(cfg.optim_wrapper.paramwise_cfg) == {"norm_decay_mult": 0.0}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_the_file_of_a_published_row_states_its_figures(row):
    head = (CONFIGS / f"{config_name('mask_rcnn', row)}.py").read_text().splitlines()[:2]
    assert head[0] == f"# python -m detection config={config_name('mask_rcnn', row)} data.root=PATH"
    assert head[1] == f"# Published: box AP {row['box_ap']}, mask AP {row['mask_ap']}."


RIVALS = [row for row in published() if row.task == DETECTION and row.has_code and row.dynamic not in ("kw", "static")]


@pytest.mark.parametrize("row", RIVALS, ids=lambda row: row.id)
def test_a_rivals_row_is_set_as_published(row):
    head = (CONFIGS / f"{row.name}.py").read_text().splitlines()[:2]
    scores = row.scores
    assert head[0] == f"# python -m detection config={row.name} data.root=PATH"
    assert head[1] == f"# Published: box AP {scores['box_ap']}, mask AP {scores['mask_ap']}."
    cfg, plain = load(row.name), load("mask_rcnn_kw4x_resnet50_1x_coco")
    assert (cfg.model.backbone.dynamic, cfg.model.backbone.n) == (row.dynamic, row.n)
    own = row.dynamic == "fdconv"  # which has its own steps, padding and batch
    assert cfg.param_scheduler[1].milestones == ([10, 11] if own else plain.param_scheduler[1].milestones)
    assert cfg.model.data_preprocessor.pad_size_divisor == (64 if own else 32)
    assert cfg.train_dataloader.batch_size == (4 if own else plain.train_dataloader.batch_size)
    assert cfg.optim_wrapper == plain.optim_wrapper and cfg.train_pipeline == plain.train_pipeline


@pytest.mark.parametrize("detector", ["mask_rcnn", "faster_rcnn"])
def test_images_are_augmented_as_in_detr(detector):
    cfg = load(f"{detector}_kw1x_resnet50_1x_coco")
    kinds = [step.type for step in cfg.train_pipeline]
    assert kinds == ["LoadImageFromFile", "LoadAnnotations", "RandomFlip", "RandomChoice", "PackDetInputs"]
    assert cfg.train_pipeline[1].get("with_mask", False) == (detector == "mask_rcnn")
    plain, cropped = cfg.train_pipeline[3].transforms
    assert [step.scales for step in plain] == [SIZES] == [cropped[2].scales]
    assert [step.type for step in cropped] == ["RandomChoiceResize", "RandomCrop", "RandomChoiceResize"]
    assert cropped[0].scales == [(400, 1333), (500, 1333), (600, 1333)] and cropped[1].crop_size == (384, 600)
    assert cfg.test_pipeline[1].scale == (1333, 800)


def shrunk(cfg):
    """The model, with narrow heads and few regions."""
    model, roi = cfg.model, cfg.model.roi_head
    model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
    model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    model.train_cfg.rcnn.sampler.num = 8
    roi.bbox_head.update(fc_out_channels=16, num_classes=3)
    if roi.mask_head:
        roi.mask_head.update(num_convs=1, conv_out_channels=8, num_classes=3)
    return model


def inputs(model, training, batch=2, masks=True):
    data = demo_mm_inputs(batch, [[3, 64, 64]] * batch, num_classes=3, with_mask=masks)
    return model.data_preprocessor(data, training)


def often(name):
    """Each backbone with a warehouse and both detectors; static ones and Faster R-CNN, which is Mask R-CNN without its
    masks, with the smallest backbone alone."""
    return "resnet18" in name or name.startswith("mask_rcnn_kw1x")


@pytest.mark.parametrize("name", representative(NAMES, often))
def test_it_is_built_and_gives_losses_gradients_and_detections(name):
    cfg = load(name)
    model, masks = MODELS.build(shrunk(cfg)), "mask_rcnn" in name
    model.train()
    losses, _ = model.parse_losses(model(**inputs(model, True, masks=masks), mode="loss"))
    losses.backward()
    assert torch.isfinite(losses)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    stems = tuple(f"backbone.model.{part}" for part in ("conv1", "conv_stem", "stem", "patch_embed"))
    assert any(name.startswith(stems) for name in trained) == (cfg.model.backbone.get("frozen_stages", -1) < 0)
    model.eval()
    model.test_cfg.rcnn.score_thr = 0.0
    with torch.no_grad():
        found = model(**inputs(model, False, batch=1, masks=masks), mode="predict")[0].pred_instances
    assert len(found) and found.bboxes.shape == (len(found), 4) and torch.isfinite(found.bboxes).all()
    assert ("masks" in found) == masks and (not masks or found.masks.shape == (len(found), 64, 64))
    temperatures = {float(m.temperature) for m in model.modules() if isinstance(m, Attention)}
    assert temperatures == ({0.0} if "kw" in name else set())


def test_weights_decay_but_not_on_norms():
    cfg = load("mask_rcnn_kw1x_resnet18_1x_coco")
    model = MODELS.build(shrunk(cfg))
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decays = {p: group["weight_decay"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    of_norms = {p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    assert {decays[p] for p in of_norms if p.requires_grad} == {0.0}
    assert {decay for p, decay in decays.items() if p not in of_norms and p.requires_grad} == {0.05}
    assert decays.keys() >= {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("stem.0.weight", 0),
        ("stages.0.blocks.2.gamma", 1),
        ("stages.1.downsample.1.bias", 2),
        ("stages.1.blocks.0.conv_dw.attention.fc1.weight", 2),
        ("stages.2.downsample.0.weight", 3),
        ("stages.2.blocks.2.norm.weight", 3),
        ("stages.2.blocks.3.norm.weight", 4),
        ("stages.2.blocks.8.norm.weight", 5),
        ("stages.3.downsample.0.weight", 6),
        ("stages.3.blocks.2.norm.weight", 6),
        ("head.norm.weight", 7),
    ],
)
def test_the_layers_of_convnext_are_grouped_as_its_authors_do(name, group):
    assert group_of(f"backbone.model.{name}", 6) == group


@pytest.mark.parametrize("n", ["static", "1"])
def test_the_learning_rate_decays_towards_the_stem(n):
    cfg = load("mask_rcnn_kw1x_convnext_tiny_1x_coco")
    cfg.model.backbone.n = n
    model = MODELS.build(shrunk(cfg))
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    groups_of = {p: group for group in groups for p in group["params"]}
    assert groups_of.keys() == set(model.parameters()) and len(groups_of) == sum(
        len(group["params"]) for group in groups
    )
    for name, p in model.named_parameters():
        expected = group_of(name, 6)
        if ".warehouse." in name:
            layers = {x: m for x, m in model.named_modules() if isinstance(m, KWLayer) and m.warehouse.cells is p}
            expected = max(group_of(f"{layer}.", 6) for layer in layers)
        assert groups_of[p]["lr"] == pytest.approx(1e-4 * 0.95 ** (7 - expected)), name
        assert groups_of[p]["weight_decay"] == (0.05 if p.dim() > 1 else 0.0), name
    assert {round(group["lr"] / 1e-4, 6) for group in groups} == {round(0.95**k, 6) for k in range(8)}


def test_layer_decay_is_for_convnext():
    cfg = load("mask_rcnn_resnet18_1x_coco")
    with pytest.raises(SettingError, match="ConvNeXt"):
        build_optim_wrapper(
            MODELS.build(shrunk(cfg)),
            {**cfg.optim_wrapper, "constructor": "ConvNeXtLayerDecay", "paramwise_cfg": {"num_layers": 6}},
        )


# What MMDetection's own cases for two-stage detectors do, with its own configurations; and a one-stage detector.
THEIRS = [
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco",
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco",
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco",
    "retinanet/retinanet_r50_fpn_1x_coco",
]


WITH_AND_WITHOUT_MASKS = ("cascade_rcnn/cascade-mask", "retinanet")


@pytest.mark.parametrize("name", representative(THEIRS, lambda name: name.startswith(WITH_AND_WITHOUT_MASKS)))
def test_mmdetections_own_detectors_run_on_torchvisions_operators(name):
    model = Config.fromfile(Path(mmdet.__file__).parent / f".mim/configs/{name}.py").model
    model.backbone.update(depth=18, init_cfg=None)
    model.neck.update(in_channels=[64, 128, 256, 512], out_channels=16)
    narrow(model)
    detector = MODELS.build(model)
    detector.train()
    losses, _ = detector.parse_losses(detector(**inputs(detector, True), mode="loss"))
    losses.backward()
    assert torch.isfinite(losses)
    detector.eval()
    with torch.no_grad():
        assert len(detector(**inputs(detector, False), mode="predict")) == 2


def narrow(part):
    """16 channels wherever there were 256, and few regions."""
    for key, value in part.items():
        if key.endswith("channels") and (value == 256 or key.startswith("fc")):
            part[key] = 16
        elif key in ("nms_pre", "max_per_img"):
            part[key] = 20
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                narrow(inner)
