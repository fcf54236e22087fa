"""Way "convolve": each sample with a block of its kernel goes through the library's own convolution.

Best where there are many positions: it does without a copy of the input for every tap. Kernels come with input channels
last, as mixtures are then put in place by moving runs of numbers; so all of it is computed channels last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kw.ways.grouped import CONVOLUTIONS
from kw.ways.task import Task


class Convolve:
    """For `groups == 1`."""

    def __init__(self, x: Tensor, task: Task):
        self.x, self.task = _channels_last(x), task
        self._grad_x: Tensor | None = None

    def forward(self, kernels: Tensor) -> list[Tensor]:
        convolve, task = CONVOLUTIONS[self.x.dim() - 2], self.task
        return [
            convolve(x, weight, None, task.stride, task.padding, task.dilation)[0].flatten(1)
            for x, weight in zip(self.x.chunk(len(self.x)), self._as_weights(kernels), strict=True)
        ]

    def backward(self, grad: Tensor, kernels: Tensor, needed: tuple[bool, bool]) -> list[Tensor] | None:
        task = self.task
        weights = self._as_weights(kernels)
        grad = _channels_last(torch.unflatten(grad, 2, task.out_size(tuple(self.x.shape[2:]))))
        grad_weights: list[Tensor] = []
        grad_x = []
        for x, g, weight in zip(self.x.chunk(len(self.x)), grad.chunk(len(grad)), weights, strict=True):
            of_x, of_weight, _ = torch.ops.aten.convolution_backward(
                g, x, weight, None, task.stride, task.padding, task.dilation, False, [0] * (x.dim() - 2), 1,
                (*needed, False),
            )  # fmt: skip
            grad_x.append(of_x)
            if needed[1]:
                grad_weights.append(of_weight.movedim(1, -1).flatten(1))
        if needed[0]:
            whole = torch.cat(grad_x)
            self._grad_x = whole if self._grad_x is None else self._grad_x.add_(whole)
        return grad_weights if needed[1] else None

    def grad_x(self) -> Tensor:
        assert self._grad_x is not None
        return self._grad_x

    def _as_weights(self, kernels: Tensor) -> Tensor:
        """`(b, R * r, P * C * i)` as `(b, R * r, C_in, *kernel_size)`; a view."""
        return kernels.view(*kernels.shape[:2], *self.task.kernel_size, -1).movedim(-1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
