"""The choices of how to compute a layer that tests go through: how kernels are applied, and how they are made."""

from kw import functional
from kw.compute import IMPLEMENTATIONS

OF_CELLS = tuple(IMPLEMENTATIONS)
FOLDED = tuple(f"{name} folded" for name in OF_CELLS if name != "inputs")  # which mixes the input, by cells
SETTINGS = ("auto", *OF_CELLS, *FOLDED)
PLAIN = "grouped"
OTHERS = (*OF_CELLS[1:], *FOLDED)
REMADE = ("blocks", "triton", "blocks folded", "triton folded")  # kernels are made again in the backward pass


def force(setting):
    """`functional.use` of one of these."""
    return functional.use(*setting.split())
