"""Matrix products by the faster of the libraries that torch has on board.

For float32 on a CPU, `@` is MKL's, which on AMD processors leaves a third of the speed of oneDNN, the library behind
torch's convolutions (measured: 65 to 85 against 95 to 105 billion multiply-adds and additions a second and core). torch
offers oneDNN's product only under a name meant for its compiler, so `@` takes its place where the name is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`(M, K) @ (K, N)`; without gradients of its own."""
    if _onednn is None or a.dtype != torch.float32 or a.device.type != "cpu" or 0 in (*a.shape, *b.shape):
        return a @ b
    if not _is_dense(b) and b.numel() > max(a.numel(), len(a) * b.shape[1]):
        return a @ b
    # oneDNN is slow beyond use on rows (or columns) with gaps between them; so they are copied together.
    out: Tensor = _onednn(_dense(a), _dense(b).t(), None, "none", [], "")
    return out


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.t().is_contiguous()


def _dense(x: Tensor) -> Tensor:
    return x if _is_dense(x) else x.contiguous() if x.stride(1) == 1 else x.t().contiguous().t()
