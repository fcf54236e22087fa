"""Products with a matrix in a narrow type, without a copy of all of it in a wide one.

Where the processor multiplies bfloat16 (AVX-512 BF16, AMX), products are in it, with sums in float32; int8 is converted
to it, which is exact. Elsewhere the matrix is converted to the other one's type. It is converted in pieces that fit a
cache, so that memory is read in the narrow type alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.int8)
PIECE = 1 << 18  # numbers to convert at a time: 1 MB in float32


def narrow_product(a: Tensor, b: Tensor) -> Tensor:
    """`(M, K) @ (K, N)` with `b` in a type of `NARROW`, to the type of `a`; not differentiable."""
    dtype = torch.bfloat16 if multiplies_bfloat16(a.device) else a.dtype
    left = a.to(dtype)
    if b.dtype == dtype:
        return (left @ b).to(a.dtype)
    out = left.new_empty(len(a), b.shape[1])
    width = max(PIECE // len(b), 1)
    for piece, part in zip(torch.split(b, width, dim=1), torch.split(out, width, dim=1), strict=True):
        torch.mm(left, piece.to(dtype), out=part)
    return out.to(a.dtype)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are fast. Of CPUs, torch tells it under a private name only."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cuda" or (device.type == "cpu" and supported())
