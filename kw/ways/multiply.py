"""Way "multiply": a block of kernels is applied by one matrix product a sample, to the input's taps.

Best where the taps are the input itself (pointwise convolutions and linear layers), or where there are few positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kw.ways.product import PerSample, pieces, products
from kw.ways.task import Task


class Multiply:
    """For `groups == 1`."""

    def __init__(self, x: Tensor, task: Task):
        self.x, self.task = x, task
        self.taps = task.taps(x)  # (b, S, P * C * i)
        self._grad_taps: PerSample | None = None

    def forward(self, kernels: Tensor) -> PerSample:
        if self.x.stride(1) == 1:  # channels last, as are linear layers' inputs
            y = products(self.taps, kernels.transpose(1, 2))
            return y.transpose(1, 2) if isinstance(y, Tensor) else [one.t() for one in y]
        return products(kernels, self.taps.transpose(1, 2))

    def backward(self, grad: Tensor, kernels: Tensor, needed: tuple[bool, bool]) -> PerSample | None:
        if needed[0]:
            of_taps = products(grad.transpose(1, 2), kernels)
            if self._grad_taps is None:
                self._grad_taps = of_taps
            else:
                for (_, total), (_, more) in zip(pieces(self._grad_taps), pieces(of_taps), strict=True):
                    total.add_(more)
        return products(grad, self.taps) if needed[1] else None

    def grad_x(self) -> Tensor:
        assert self._grad_taps is not None
        whole = self._grad_taps if isinstance(self._grad_taps, Tensor) else torch.stack(self._grad_taps)
        return self.task.untap(whole, self.x)
