"""The plugin in processes that do not import `python -m detection`: it registers, and changes nothing else."""

import ast
import subprocess
import sys

import pytest
from helpers.programs import ROOT, environment

from detection import torchvision_ops

PLUGIN = [ROOT / "detection/__init__.py", *sorted((ROOT / "detection/plugin").glob("*.py"))]


def python(code, cwd=None):
    """Run `code` in a new process, which has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def imported(source):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("source", PLUGIN, ids=lambda source: source.stem)
def test_the_plugin_stands_on_kw_and_mmdetection(source):
    theirs = {"mmcv", "mmdet", "mmengine", "numpy", "PIL"}  # MMDetection, and what it needs itself
    known = {"kw", *theirs, "safetensors", "timm", "torch", *sys.stdlib_module_names}
    for name in imported(source):
        assert name.startswith("detection.plugin.") or name.partition(".")[0] in known, name


IMPORTED = """
import sys
import kw, mmcv, mmdet.apis, mmdet.evaluation, mmdet.structures, mmdet.utils, mmengine.runner
from mmdet import registry
from mmengine.runner import CheckpointLoader

def values():
    '''What every module of theirs, and every class in it, has under each name.'''
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("mmcv", "mmdet", "mmengine"):
            for key, value in list(vars(module).items()):
                found[name, key] = value
                if isinstance(value, type) and value.__module__.startswith("mm"):
                    found.update({(name, key, inner): v for inner, v in vars(value).items()})
    return found

def registered():
    registries = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]
    return {(each.name, key) for each in registries for key in each.module_dict}

before, modules, known, schemes = values(), set(sys.modules), registered(), dict(CheckpointLoader._schemes)
import detection

after = values()
changed = [key for key, value in before.items() if key not in after or after[key] is not value]
assert not changed, changed
assert CheckpointLoader._schemes == schemes
assert {key for _, key in registered() - known} == {
    "KWBackbone", "SimplePyramid", "ConvNeXtLayerDecay", "TemperatureWarmup", "ExactTrainLoop", "LoadWholeImage"
}
new = set(sys.modules) - modules
assert not any(name.startswith(("mmcv._ext", "mmcv.ops")) for name in new), new
assert not {name.partition(".")[0] for name in new} & {"train", "hydra", "omegaconf"}
"""

# mmcv has no compiled operators here: modules of MMDetection that looked for them before get torchvision's too.
OPERATORS = """
from mmdet.structures.mask import structures
theirs = [sys.modules[f"mmdet.{place}.bbox_overlaps"] for place in ("structures.bbox", "evaluation.functional")]
overlaps = [module.bbox_overlaps for module in theirs]  # which mmcv has one of, too
try:
    import mmdet.models  # fails half-way, after some modules have put functions that raise in place of the operators
except ImportError:
    pass
raises = structures.roi_align
import detection.torchvision_ops, mmcv.ops
from mmdet.models.dense_heads import rpn_head
from mmdet.models.losses import focal_loss
assert structures.roi_align is mmcv.ops.roi_align is not raises
assert rpn_head.batched_nms is mmcv.ops.batched_nms
assert focal_loss._sigmoid_focal_loss is mmcv.ops.sigmoid_focal_loss
assert [module.bbox_overlaps for module in theirs] == overlaps
"""


def test_importing_it_registers_and_changes_nothing_else_until_operators_are_asked_for():
    python(IMPORTED + (OPERATORS if torchvision_ops.in_use() else ""))


@pytest.mark.slow
def test_the_configurations_serve_mmdetections_own_runner(tmp_path):
    """Also after imports of its modules that look for operators. Checkpoints are read as MMEngine does it."""
    python(
        f"""
import pathlib, sys
import torch
from mmdet.apis import init_detector
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.runner import CheckpointLoader, Runner

schemes = dict(CheckpointLoader._schemes)
cfg = Config.fromfile("{ROOT}/detection/configs/mask_rcnn_kw1x_digits.py")
cfg.merge_from_dict({{"model.backbone.kwargs.channels": [8, 8, 8, 8], "model.backbone.kwargs.stem_width": 8}})
cfg.model.neck.in_channels = [8, 8, 8, 8]
cfg.work_dir = "work"
runner = Runner.from_cfg(cfg)
optimizer = runner.build_optim_wrapper(cfg.optim_wrapper)
images = demo_mm_inputs(2, [[3, 64, 64]] * 2, num_classes=10, with_mask=True)
runner.model.train()
losses = runner.model.train_step(images, optimizer)
assert torch.isfinite(losses["loss"]) and losses["loss_mask"] > 0
runner.model.eval()
with torch.no_grad():
    assert len(runner.model.test_step(images)) == 2

assert CheckpointLoader._schemes == schemes
torch.save({{"meta": pathlib.Path("kept")}}, "other.pth")  # which weights_only=True refuses
assert CheckpointLoader.load_checkpoint("other.pth") == {{"meta": pathlib.Path("kept")}}
program = {{name for name in sys.modules if name.partition(".")[0] in ("train", "hydra", "omegaconf")}}
assert not program and "detection.run" not in sys.modules, program
""",
        cwd=tmp_path,
    )


def test_compiled_operators_are_used_where_they_are(tmp_path):
    """A module where mmcv has its compiled one stays the one that mmcv finds."""
    (tmp_path / "_ext.py").write_text("built = True")
    code = f"""
import sys
import mmcv
mmcv.__path__.insert(0, {str(tmp_path)!r})
from detection import torchvision_ops
assert not torchvision_ops.in_use() and "mmcv.ops" not in sys.modules
import mmcv._ext
assert mmcv._ext.built
"""
    python(code)
