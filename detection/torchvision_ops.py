"""torchvision's operators in place of mmcv's compiled ones. Importing this module installs them.

mmcv.ops is Python code around one compiled module, `mmcv._ext`. Where that was not built, this module takes its place,
so that all of mmcv.ops works unchanged, autograd included, on a CPU and on a GPU. Where it was built, nothing happens.
Name this module first in a configuration, as MMDetection's models look for the operators when they are imported:
`custom_imports = dict(imports=["detection.torchvision_ops", "detection"])`. A script that imports the models before it
reads a configuration, such as MMDetection's tools/test.py, runs by `python -m detection.torchvision_ops SCRIPT ...`.

The arguments are those of mmcv's functions, most of which write their result into a tensor of the caller.
Boxes are `(N, 4)`: x1, y1, x2, y2 in pixels. RoIs are `(R, 5)`: the index of the image in the batch, then a box.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import runpy
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import mmcv
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, sigmoid_focal_loss

EXTENSION = "mmcv._ext"
NAIVE, LINEAR, GAUSSIAN = 0, 1, 2  # methods of soft-NMS


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than the threshold, best first.

    Args:
        offset: 1 if x2 and y2 belong to the box (a width is x2 - x1 + 1), else 0.
    """
    boxes, scores = _at_least_float32(boxes), _at_least_float32(scores)
    return torchvision.ops.nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503): a box loses score by its overlap with better ones, and is dropped below `min_score`.

    Writes the boxes that stay, with their scores, to `dets` `(N, 5)`, best first, and returns their indices.
    """
    corners, scores = boxes + boxes.new_tensor([0, 0, offset, offset]), scores.clone()
    left = torch.arange(len(boxes), device=boxes.device)
    kept: list[Tensor] = []
    while len(left):
        best = left[scores[left].argmax()]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        left = left[left != best]
        overlap = box_iou(corners[best][None], corners[left])[0].nan_to_num(0)  # 0 / 0 for two empty boxes
        if method == GAUSSIAN:
            scores[left] *= torch.exp(-(overlap**2) / sigma)
        else:
            lower = 1 - overlap if method == LINEAR else torch.zeros_like(overlap)
            scores[left] *= torch.where(overlap >= iou_threshold, lower, 1.0)
        left = left[~(scores[left] < min_score)]
    return torch.stack(kept) if kept else left


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **settings: Any
) -> None:
    """Features `(B, C, H, W)`, averaged in the bins of each RoI, to `output` `(R, C, height, width)`."""
    scale, height, width, *sampling = _roi_settings(**settings)
    input = _at_least_float32(input)
    output.copy_(torchvision.ops.roi_align(input, rois.to(input.dtype), (height, width), scale, *sampling))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **settings: Any
) -> None:
    """The gradient of `roi_align_forward`, to `grad_input` `(B, C, H, W)`."""
    scale, height, width, *sampling = _roi_settings(**settings)
    grad = _at_least_float32(grad_output)
    where = (rois.to(grad.dtype), scale, height, width)
    grad_input.copy_(ROI_ALIGN_GRADIENT(grad, *where, *grad_input.shape, *sampling))


def _roi_settings(
    aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool
) -> tuple[float, int, int, int, bool]:
    """mmcv's settings in torchvision's order."""
    if pool_mode != 1:
        _refuse("roi_align with pool_mode='max'")
    return spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned


def roi_align_gradient(
    grad: Tensor, rois: Tensor, scale: float, height: int, width: int, b: int, c: int, h: int, w: int, *sampling: Any
) -> Tensor:
    """What torchvision's private operator computes, by public functions and at the cost of one more forward pass.
    RoIAlign is linear in the features, so its gradient is the same for any."""
    with torch.enable_grad():
        features = grad.new_zeros(b, c, h, w, requires_grad=True)
        output = torchvision.ops.roi_align(features, rois, (height, width), scale, *sampling)
    return torch.autograd.grad(output, features, grad)[0]


ROI_ALIGN_GRADIENT = getattr(torch.ops.torchvision, "_roi_align_backward", roi_align_gradient)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss (arXiv 1708.02002) of logits `(N, classes)` for targets `(N,)`; target `classes` is background."""
    output.copy_(_focal_loss(_at_least_float32(input), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """The gradient of `sigmoid_focal_loss_forward` by the logits, to `grad_input`."""
    with torch.enable_grad():
        logits = _at_least_float32(input.detach()).requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    hit = (target[:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
    loss: Tensor = sigmoid_focal_loss(logits, hit, alpha, gamma)
    if weight.numel():  # one for each class; the background has none
        loss = loss * F.pad(weight, (0, 1))[target][:, None]
    return loss


def _at_least_float32(tensor: Tensor) -> Tensor:
    """As autocast does. In half precision torchvision has no NMS on a CPU and no gradient of RoIAlign in bfloat16 on a
    GPU; gradients are added up in float16; and the focal loss of a likely background rounds to 0."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def __getattr__(operator: str) -> Callable[..., NoReturn]:
    """Every other operator: mmcv looks all of them up when it is imported. Calling it raises NotImplementedError."""
    if operator.startswith("__"):
        raise AttributeError(operator)
    return lambda *args, **kwargs: _refuse(operator)


def _refuse(operator: str) -> NoReturn:
    raise NotImplementedError(
        f"mmcv was installed without its compiled operators, and torchvision has none in place of {operator!r}. "
        f"Compile mmcv: pip install --no-cache-dir --no-build-isolation --force-reinstall --no-deps "
        f"onedl-mmcv=={mmcv.__version__}, where torch and a C++ compiler are installed, and nvcc for GPUs."
    )


def in_use() -> bool:
    """Whether mmcv uses this module; False where it was compiled."""
    return sys.modules.get(EXTENSION) is sys.modules[__name__]


def _install() -> None:
    if EXTENSION in sys.modules or importlib.util.find_spec(EXTENSION) is not None:
        return
    sys.modules[EXTENSION] = sys.modules[__name__]
    _repair(importlib.import_module("mmcv.ops"))


def _repair(operators: Any) -> None:
    """Give mmcv's operators to the modules of MMDetection that were imported earlier. In place of those that it did not
    find, such a module has defined functions and classes (some with "_" before the name) that raise, whatever the
    arguments. Other functions of the same names, such as its `bbox_overlaps`, are kept."""
    for module_name, module in list(sys.modules.items()):
        for name, value in list(vars(module).items()) if module_name.startswith("mmdet.") else ():
            own = getattr(value, "__module__", None) == module_name and name.lstrip("_") in operators.__all__
            if own and str(inspect.signature(value)) == "(*args, **kwargs)":
                setattr(module, name, getattr(operators, name.lstrip("_")))


if __name__ == "__main__":
    importlib.import_module("detection.torchvision_ops")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    _install()
