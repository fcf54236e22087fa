"""torchvision's operators in place of mmcv's compiled ones: each is its definition."""

import pytest
import torch
from torch.nn import functional as F

from detection import torchvision_ops as ops

DEGENERATE = torch.tensor(
    [[5.0, 5, 5, 5], [5, 5, 5, 9], [0, 0, 10, 10], [0, 0, 10, 10], [9, 9, 3, 3], [-4, -4, 2, 2], [0, 0, 1e4, 1e4]]
)
COMPILED = not ops.in_use()


def boxes_and_scores(n, seed=0):
    """Boxes `(n, 4)` that overlap a lot, some of them empty, all with scores of their own."""
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(2, n, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + size], dim=1)
    boxes = torch.cat([boxes, DEGENERATE])
    return boxes, torch.randperm(len(boxes), generator=generator) / len(boxes)


def overlap(a, b, offset):
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union else 0.0


def naive_nms(boxes, scores, threshold, offset):
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if not any(overlap(boxes[k].tolist(), boxes[i].tolist(), offset) > threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_nms_is_its_definition(threshold, offset):
    for seed in range(5):
        boxes, scores = boxes_and_scores(40, seed)
        kept = ops.nms(boxes, scores, threshold, offset)
        assert kept.tolist() == naive_nms(boxes, scores, threshold, offset)


def test_nms_of_no_boxes():
    assert ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5, 0).shape == (0,)


def naive_soft_nms(boxes, scores, threshold, sigma, least, method, offset):
    left, kept = {i: score for i, score in enumerate(scores.tolist())}, []
    while left:
        best = max(left, key=left.get)
        kept.append((best, left.pop(best)))
        for i in list(left):
            iou = overlap(boxes[best].tolist(), boxes[i].tolist(), offset)
            if method == "gaussian":
                left[i] *= float(torch.tensor(-(iou**2) / sigma).exp())
            elif iou >= threshold:
                left[i] *= 1 - iou if method == "linear" else 0
            if left[i] < least:
                del left[i]
    return kept


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_is_its_definition(method):
    boxes, scores = boxes_and_scores(30)
    scores += 0.01
    dets = torch.zeros(len(boxes), 5)
    kept = ops.softnms(boxes, scores, dets, 0.3, 0.5, 1e-3, ["naive", "linear", "gaussian"].index(method), 0)
    expected = naive_soft_nms(boxes, scores, 0.3, 0.5, 1e-3, method, 0)
    assert kept.tolist() == [i for i, _ in expected]
    assert torch.equal(dets[: len(kept), :4], boxes[kept])
    assert dets[: len(kept), 4].tolist() == pytest.approx([score for _, score in expected], rel=1e-5)
    assert ops.softnms(torch.zeros(0, 4), torch.zeros(0), dets, 0.3, 0.5, 0.0, 0, 0).shape == (0,)


def roi_align(features, rois, size, scale, samples, aligned=True, mode=1):
    out = features.new_zeros(len(rois), features.shape[1], size, size)
    nothing = features.new_zeros(0)
    ops.roi_align_forward(features, rois, out, nothing, nothing, aligned_height=size, aligned_width=size,
                          spatial_scale=scale, sampling_ratio=samples, pool_mode=mode, aligned=aligned)  # fmt: skip
    return out


def naive_roi_align(features, roi, size, scale, samples, aligned):
    """The mean of `samples` x `samples` points, each interpolated from four pixels; outside by over one pixel: 0."""
    shift = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (roi[1:] * scale - shift).tolist()
    width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
    image = features[int(roi[0])]
    _, rows, columns = image.shape

    def at(y, x):
        if y < -1 or y > rows or x < -1 or x > columns:
            return torch.zeros_like(image[:, 0, 0])
        y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
        a, b = y - top, x - left
        upper = image[:, top, left] * (1 - b) + image[:, top, right] * b
        return upper * (1 - a) + (image[:, bottom, left] * (1 - b) + image[:, bottom, right] * b) * a

    out = features.new_zeros(features.shape[1], size, size)
    places = [(k + 0.5) / samples for k in range(samples)]
    for i in range(size):
        for j in range(size):
            points = [(y1 + (i + p) * height / size, x1 + (j + q) * width / size) for p in places for q in places]
            out[:, i, j] = torch.stack([at(y, x) for y, x in points]).mean(0)
    return out


ROIS = torch.tensor(
    [[0.0, 2, 3, 20, 17], [1, -9, -9, 8, 8], [1, 5, 5, 5, 5], [0, 30, 30, 60, 60], [1, 0, 0, 32, 32]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_is_its_definition(aligned):
    features = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found = roi_align(features, ROIS, 4, 0.5, 2, aligned)
    for roi, out in zip(ROIS, found, strict=True):
        torch.testing.assert_close(out, naive_roi_align(features, roi, 4, 0.5, 2, aligned))


def test_roi_align_refuses_maxima():
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        roi_align(torch.randn(1, 1, 8, 8), torch.tensor([[0.0, 0, 0, 4, 4]]), 2, 1.0, 2, mode=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roi_align_computes_half_precision_in_float32(dtype):
    """A GPU's kernels are not there for bfloat16, and add up a gradient in float16."""
    features = torch.randn(2, 3, 16, 16).to(dtype)
    rois = ROIS.float()
    assert torch.equal(roi_align(features, rois, 4, 0.5, 2), roi_align(features.float(), rois, 4, 0.5, 2).to(dtype))
    gradient = torch.randn(len(ROIS), 3, 4, 4).to(dtype)
    settings = {"aligned_height": 4, "aligned_width": 4, "spatial_scale": 0.5, "sampling_ratio": 2}
    settings |= {"pool_mode": 1, "aligned": True}
    found, expected = torch.zeros(2, 3, 16, 16, dtype=dtype), torch.zeros(2, 3, 16, 16)
    nothing = torch.zeros(0)
    ops.roi_align_backward(gradient, rois, nothing, nothing, found, **settings)
    ops.roi_align_backward(gradient.float(), rois, nothing, nothing, expected, **settings)
    assert torch.equal(found, expected.to(dtype)) and expected.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampling", [(2, True), (0, False)])
def test_without_torchvisions_private_operator_the_gradient_is_the_same(sampling, dtype):
    gradient = torch.randn(len(ROIS), 3, 4, 5, dtype=dtype)
    where = (ROIS.to(dtype), 0.5, 4, 5, 2, 3, 16, 16, *sampling)
    assert torch.equal(ops.ROI_ALIGN_GRADIENT(gradient, *where), ops.roi_align_gradient(gradient, *where))
    assert ops.ROI_ALIGN_GRADIENT is not ops.roi_align_gradient


def focal_loss(logits, targets, weight):
    """The definition, of logits `(N, C)`; a target C is background."""
    one_hot = F.one_hot(targets, logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    p = logits.sigmoid()
    likely = p * one_hot + (1 - p) * (1 - one_hot)
    alpha = 0.25 * one_hot + 0.75 * (1 - one_hot)
    loss = -alpha * (1 - likely) ** 2 * likely.log()
    return loss if weight is None else loss * torch.cat([weight, weight.new_zeros(1)])[targets][:, None]


@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_and_its_gradient_are_the_definition(weighted):
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(12) % 6
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    expected = focal_loss(logits, targets, weight)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    inputs = (logits.detach(), targets, logits.new_zeros(0) if weight is None else weight)
    loss, slope = torch.zeros(2, 12, 5, dtype=torch.float64)
    ops.sigmoid_focal_loss_forward(*inputs, loss, gamma=2.0, alpha=0.25)
    ops.sigmoid_focal_loss_backward(*inputs, slope, gamma=2.0, alpha=0.25)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(slope, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_focal_loss_and_nms_compute_half_precision_in_float32(dtype):
    """In half precision 1 - p of a likely background is 1, and its loss 0."""
    logits, targets = torch.full((4, 3), -7.0, dtype=dtype), torch.full((4,), 3)
    nothing = torch.zeros(0)
    found, expected = torch.zeros(2, 4, 3, dtype=dtype), torch.zeros(2, 4, 3)
    for function, half, whole in zip(
        (ops.sigmoid_focal_loss_forward, ops.sigmoid_focal_loss_backward), found, expected, strict=True
    ):
        function(logits, targets, nothing, half, gamma=2.0, alpha=0.25)
        function(logits.float(), targets, nothing, whole, gamma=2.0, alpha=0.25)
        assert torch.equal(half, whole.to(dtype)) and whole.all()
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 5], [8, 8, 9, 9]], dtype=dtype)
    assert ops.nms(boxes, torch.tensor([0.5, 0.75, 0.25], dtype=dtype), 0.5, 0).tolist() == [1, 2]


def test_gradients_through_mmcvs_functions():
    from mmcv.ops import roi_align as mmcv_roi_align
    from mmcv.ops import sigmoid_focal_loss

    features = torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1, 1, 12, 9], [1, -3, 0, 5, 20], [0, 4, 4, 4, 4]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mmcv_roi_align(x, rois, 3, 0.5, 2, "avg", True), features)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4, 4])
    if not COMPILED:  # that one is for GPUs alone
        assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, targets, 2.0, 0.25, None, "sum"), logits)


@pytest.mark.parametrize("kind", [{"type": "nms", "iou_threshold": 0.5}, {"type": "soft_nms", "iou_threshold": 0.5}])
def test_batched_nms_keeps_classes_apart(kind):
    from mmcv.ops import batched_nms

    boxes, scores = boxes_and_scores(40)
    boxes, scores = boxes[:-7], scores[:-7] + 0.1
    classes = torch.arange(len(boxes)) % 3
    dets, kept = batched_nms(boxes, scores, classes, dict(kind))
    assert dets[:, 4].tolist() == sorted(dets[:, 4].tolist(), reverse=True)
    for number in range(3):
        own = (classes == number).nonzero()[:, 0]
        if kind["type"] == "nms":
            alone = own[naive_nms(boxes[own], scores[own], 0.5, 0)]
            assert kept[classes[kept] == number].tolist() == alone.tolist()
        else:
            alone = naive_soft_nms(boxes[own], scores[own], 0.5, 0.5, 1e-3, "linear", 0)
            assert kept[classes[kept] == number].tolist() == [int(own[i]) for i, _ in alone]


def test_another_operator_names_itself_and_the_remedy():
    assert hasattr(ops, "deform_conv_forward")  # mmcv looks, when it is imported
    with pytest.raises(NotImplementedError, match=r"'deform_conv_forward'.*pip install .*--no-build-isolation"):
        ops.deform_conv_forward(torch.zeros(1), groups=1)
