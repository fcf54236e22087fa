"""The ways to compute one dynamic layer, one per file. All are exact; `kw.ways.cost` says what each costs.

Each is a function of the input `(B, C_in, *space)`, the attentions `(B, m, n)`, the cells `(n, o, i)` and the `Task`,
and gives `(B, C_out, *out)`, without bias. Which to take is `kw.functional`'s business.
"""

from collections.abc import Callable

from torch import Tensor

from kw.ways.grouped import assemble, grouped
from kw.ways.inputs import inputs
from kw.ways.operator import multiply
from kw.ways.task import Task

WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Task], Tensor]] = {
    "grouped": grouped,
    "multiply": multiply,
    "inputs": inputs,
}

__all__ = ["WAYS", "Task", "assemble"]
