"""Matrix products by the faster of the libraries that torch contains.

For float32 on a CPU, `@` calls MKL, which is slower on AMD processors than oneDNN, the library of torch's convolutions
(docs/speed.md). torch offers oneDNN's product only under a private name, for its compiler. Without it, `@` is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`(M, K) @ (K, N)`; not differentiable."""
    if _onednn is None or a.dtype != torch.float32 or a.device.type != "cpu" or 0 in (*a.shape, *b.shape):
        return a @ b
    if not _is_dense(b) and b.numel() > max(a.numel(), len(a) * b.shape[1]):
        return a @ b
    # oneDNN is very slow for matrices with gaps between rows or columns, so those are copied.
    out: Tensor = _onednn(_dense(a), _dense(b).t(), None, "none", [], "")
    return out


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.t().is_contiguous()


def _dense(x: Tensor) -> Tensor:
    return x if _is_dense(x) else x.contiguous() if x.stride(1) == 1 else x.t().contiguous().t()
