"""Stand-ins for mmcv's compiled operators: torchvision's nms and RoIAlign, and a few lines of torch.

mmcv.ops is Python around one compiled module, `mmcv._ext`. Where that was not built, a module with the same functions
takes its place, so that all of mmcv.ops (autograd included) works as it is, on CPU and GPU. A built one is left alone.

Arguments are those of mmcv's functions: most write their result into a tensor that the caller made.
Boxes are `(N, 4)`: x1, y1, x2, y2 in pixels. RoIs are `(R, 5)`: the image's index in the batch, then a box.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

import mmcv
import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

EXTENSION = "mmcv._ext"
SMALLEST = torch.finfo(torch.float32).tiny  # of a probability whose logarithm is taken
NAIVE, LINEAR, GAUSSIAN = 0, 1, 2  # soft-nms


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than the threshold, best first.

    Args:
        offset: 1 where x2 and y2 belong to the box (a width is x2 - x1 + 1), else 0.
    """
    return torchvision_nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)


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
    """Soft-NMS (arXiv 1704.04503): a box loses score by its overlap with better ones, and drops out below `min_score`.

    Writes the boxes that stay, with their scores, to `dets` `(N, 5)`, best first, and returns their indices.
    """
    corners, scores = boxes.clone(), scores.clone()
    corners[:, 2:] += offset
    left = torch.arange(len(boxes), device=boxes.device)
    kept: list[Tensor] = []
    while len(left):
        best = left[scores[left].argmax()]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        left = left[left != best]
        overlap = _overlap(corners[best], corners[left])
        if method == GAUSSIAN:
            scores[left] *= torch.exp(-(overlap**2) / sigma)
        else:
            loss = overlap if method == LINEAR else torch.ones_like(overlap)
            scores[left] *= torch.where(overlap >= iou_threshold, 1 - loss, 1.0)
        left = left[~(scores[left] < min_score)]
    return torch.stack(kept) if kept else left


def _overlap(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box with each of `boxes`; 0 where both are empty."""
    shared = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(min=0).prod(1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - shared
    return (shared / union).nan_to_num(0)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Features `(B, C, H, W)` averaged in `aligned_height` by `aligned_width` bins of each RoI, to `output`."""
    _check_pool_mode(pool_mode)
    size = (spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned)
    output.copy_(torch.ops.torchvision.roi_align(input, rois.to(input.dtype), *size))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The gradient of `roi_align_forward`, to `grad_input` `(B, C, H, W)`."""
    _check_pool_mode(pool_mode)
    size = (spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned)
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(grad_output, rois.to(grad_output.dtype), *size))


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        _refuse("roi_align with pool_mode='max'")


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss (arXiv 1708.02002) of logits `(N, classes)` for targets `(N,)`; target `classes` is background."""
    p, hit, scale = _focal_terms(input, target, weight, alpha)
    positive = (1 - p) ** gamma * p.clamp(min=SMALLEST).log()
    negative = p**gamma * (1 - p).clamp(min=SMALLEST).log()
    output.copy_(-scale * torch.where(hit, positive, negative))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """The gradient of `sigmoid_focal_loss_forward` by the logits, to `grad_input`."""
    p, hit, scale = _focal_terms(input, target, weight, alpha)
    positive = (1 - p) ** gamma * (1 - p - gamma * p * p.clamp(min=SMALLEST).log())
    negative = p**gamma * (gamma * (1 - p) * (1 - p).clamp(min=SMALLEST).log() - p)
    grad_input.copy_(-scale * torch.where(hit, positive, negative))


def _focal_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, which of them are of the target's class, and what each term is multiplied by."""
    hit = target[:, None] == torch.arange(input.shape[1], device=input.device)
    scale = torch.where(hit, alpha, 1 - alpha).to(input.dtype)
    if weight.numel():  # by class; background has none
        padded = torch.cat([weight, weight.new_zeros(1)])
        scale = scale * padded[target][:, None]
    return input.sigmoid(), hit, scale


STAND_INS: dict[str, Callable[..., Any]] = {
    "nms": nms,
    "softnms": softnms,
    "roi_align_forward": roi_align_forward,
    "roi_align_backward": roi_align_backward,
    "sigmoid_focal_loss_forward": sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": sigmoid_focal_loss_backward,
}


def _refuse(operator: str) -> NoReturn:
    raise NotImplementedError(
        f"mmcv was installed without its compiled operators, and detection/ops.py has none in place of {operator!r}. "
        f"Compile mmcv: pip install --no-cache-dir --no-build-isolation --force-reinstall --no-deps "
        f"onedl-mmcv=={mmcv.__version__}, "
        f"with torch, a C++ compiler and, for GPUs, CUDA's nvcc there."
    )


class Extension(types.ModuleType):
    """A module with our stand-ins, in which every other operator can be looked up, as mmcv does when it is imported,
    and says what it lacks when it is called."""

    def __init__(self) -> None:
        super().__init__(EXTENSION, __doc__)
        self.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, loader=None, origin=__file__)
        self.__dict__.update(STAND_INS)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: _refuse(name)


def install() -> None:
    """Put the stand-ins in place, unless the compiled operators are there."""
    if EXTENSION in sys.modules or importlib.util.find_spec(EXTENSION) is not None:
        return
    sys.modules[EXTENSION] = Extension()
    _mend()


def _mend() -> None:
    """Modules of MMDetection that were imported before have looked for the operators in vain, and made functions or
    classes of the same names (some with "_" before it) that only raise: give them mmcv's."""
    operators = importlib.import_module("mmcv.ops")
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("mmdet."):
            for name, value in list(vars(module).items()):
                if getattr(value, "__module__", None) == module_name and name.lstrip("_") in operators.__all__:
                    setattr(module, name, getattr(operators, name.lstrip("_")))
