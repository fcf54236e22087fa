"""Implementations of one dynamic layer, each in its own file. All are exact; `kw.compute.cost` says what each costs.

Each takes the input `(B, C_in, *space)`, the weights and the basis that kernels are made from (mixing.py) and the
layer's `Geometry`, and returns `(B, C_out, *out)` without bias. `kw.functional` chooses between them.
"""

from collections.abc import Callable

from torch import Tensor

from kw.compute import batched, grouped, inputs
from kw.compute.geometry import Geometry
from kw.compute.grouped import assemble
from kw.compute.operator import remade

IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]] = {
    "grouped": grouped.forward,
    "batched": batched.forward,
    "blocks": remade("blocks"),
    "inputs": inputs.forward,
    "triton": remade("triton"),
}
MAKES = ("cells", "folded")  # how kernels are made: mixing.py

__all__ = ["IMPLEMENTATIONS", "MAKES", "Geometry", "assemble"]
