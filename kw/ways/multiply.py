"""Way "multiply": a block of kernels is applied by one matrix product a sample, to the input's taps.

Best where the taps are the input itself (pointwise convolutions and linear layers), or where there are few positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kw.ways.product import products
from kw.ways.task import Task


class Multiply:
    """For `groups == 1`."""

    def __init__(self, x: Tensor, task: Task):
        self.x, self.task = x, task
        self.taps = task.taps(x)  # (b, S, P * C * i)
        self._grad_taps: Tensor | None = None

    def forward(self, kernels: Tensor) -> Tensor:
        if self.x.stride(1) == 1:  # channels last, as are linear layers' inputs
            return products(self.taps, kernels.transpose(1, 2)).transpose(1, 2)
        return products(kernels, self.taps.transpose(1, 2))

    def backward(self, grad: Tensor, kernels: Tensor, needed: tuple[bool, bool]) -> Tensor | None:
        if needed[0]:
            of_taps = products(grad.transpose(1, 2), kernels)
            self._grad_taps = of_taps if self._grad_taps is None else self._grad_taps.add_(of_taps)
        return products(grad, self.taps) if needed[1] else None

    def grad_x(self) -> Tensor:
        assert self._grad_taps is not None
        return self.task.untap(self._grad_taps, self.x)
