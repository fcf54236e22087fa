"""What surrounds a layer's forward pass, where that leaves fewer implementations: recording, and transformations.

Exporters and tracers record operations, to run them with other inputs: torch.export, torch.jit.trace, make_fx. A
branch on a size, a loop over the batch and a number of groups that is a multiple of the batch would be recorded for
this input's sizes alone. torch.func's transformations (vmap, grad, jvp) and forward-mode derivatives need a rule for
each operation, which custom operators do not have. torch.fx passes proxies in place of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

# Private, as torch has no public question for any of these. Without one, its answer is "no": then the setting "grouped"
# must be forced by hand (kw.functional.use).
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def is_recorded(sizes: Sequence[int]) -> bool:
    """Whether the operations on an input of these sizes are recorded, to run with other sizes. torch.compile does not
    count: it compiles again where a size decides."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    if torch.compiler.is_compiling():
        # Some exporters trace like torch.compile does. torch.compiler.is_exporting() is True in both (torch 2.11).
        return not torch.compiler.is_dynamo_compiling() or getattr(torch.compiler, "_is_exporting_flag", False)
    return any(isinstance(size, torch.SymInt) for size in sizes)


def is_transformed() -> bool:
    """Whether a transformation of torch.func or a forward-mode derivative is active."""
    return _transforms_active() or getattr(forward_ad, "_current_level", -1) >= 0


def is_observed() -> bool:
    """Whether every operation is shown to a dispatch mode, such as torch's FLOP counter."""
    return _modes() > 0


def leaf(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Decorates a module's `forward` so that torch.fx records one call of the module, as it does for torch's layers. It
    cannot record what is inside, which depends on dtypes and sizes."""

    @wraps(forward)
    def wrapped(self: Any, input: Tensor) -> Tensor:  # as torch's layers name it
        if isinstance(input, Proxy):
            tracer: Any = input.tracer
            called: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
            return called
        return forward(self, input)

    return wrapped
