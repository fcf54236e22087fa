"""Matrix products by the faster of the libraries that torch has on board.

For float32 on a CPU, `@` is MKL's, which on AMD processors leaves a third of the speed of oneDNN, the library behind
torch's convolutions (measured: 65 to 85 against 95 to 105 billion multiply-adds and additions a second and core). torch
offers oneDNN's product only under a name meant for its compiler, so `@` takes its place where the name is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PerSample = Tensor | list[Tensor]  # in one piece or a list, whichever is at hand: putting them together is a copy
LARGE = 1 << 20  # multiply-adds of one product, from which a call of its own for each sample pays

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`(M, K) @ (K, N)`; without gradients of its own."""
    if not _has_onednn(a) or 0 in (*a.shape, *b.shape):
        return a @ b
    out: Tensor = _onednn(_dense(a), _dense(b).t(), None, "none", [], "")  # type: ignore[misc]
    return out


def products(a: Tensor, b: Tensor) -> PerSample:
    """`(B, M, K) @ (B, K, N)`, one per sample; without gradients of its own."""
    if _has_onednn(a) and a.shape[1] * a.shape[2] * b.shape[2] >= LARGE:
        return [product(one, other) for one, other in zip(a, b, strict=True)]
    return torch.bmm(a, b)


def pieces(values: PerSample) -> Iterator[tuple[slice, Tensor]]:
    """Which samples, and their values `(b, ...)`: all at once, or one by one."""
    if isinstance(values, Tensor):
        yield slice(None), values
    else:
        for b, value in enumerate(values):
            yield slice(b, b + 1), value.unsqueeze(0)


def _has_onednn(x: Tensor) -> bool:
    return _onednn is not None and x.dtype == torch.float32 and x.device.type == "cpu"


def _dense(x: Tensor) -> Tensor:
    """oneDNN is slow beyond use on rows (or columns) with gaps between them; so they are copied together."""
    return x.contiguous() if x.stride(1) == 1 else x.t().contiguous().t()
