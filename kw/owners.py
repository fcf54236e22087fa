"""What a module needs that several layers register as their own: to be visited once, and saved once.

Torch treats a shared module mostly right: its parameters are listed, moved and optimized once. But a state dict would
have its entries under the name of each layer, and files would grow; and tools that walk through `named_children()`,
such as accelerate, would visit it once for each layer.

Nothing here is state: copies and saved files start anew.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableSequence
from typing import Any

from torch import Tensor, nn


class Owners:
    """The layers that have registered a module as theirs, in the order in which they did. It does not keep them alive.
    Copies of the layers register themselves again. A layer that was taken out of the model, but is kept, still counts:
    walks through the model then miss the module, while `parameters()` and `modules()` find it."""

    def __init__(self) -> None:
        self._layers: list[weakref.ref[nn.Module]] = []

    def add(self, layer: nn.Module) -> None:
        self._layers = [ref for ref in self._layers if ref() is not None] + [weakref.ref(layer)]

    def first(self) -> nn.Module | None:
        """The first one that is still there."""
        return next((layer for ref in self._layers if (layer := ref()) is not None), None)

    def __reduce__(self) -> tuple[type[Owners], tuple[()]]:
        return type(self), ()


class OneEntry:
    """Saves one tensor of a shared module under one name, and loads it under any of its names."""

    def __init__(self) -> None:
        self._prefix: str | None = None  # under which it was saved first
        self._call: MutableSequence[str] | None = None  # missing keys of the last call: a new call has a new list
        self._is_found = False
        self._reported: list[str] = []

    def is_new(self, destination: dict[str, Any], prefix: str, name: str, tensor: Tensor) -> bool:
        """Whether `destination`, the state dict that is being made, has no entry `name` of the module under another
        prefix. Then it is to be saved under this one."""
        saved = destination.get(f"{self._prefix}{name}") if self._prefix not in (None, prefix) else None
        if saved is not None and _is_same(saved, tensor):
            return False
        self._prefix = prefix
        return True

    def report(self, missing_keys: MutableSequence[str], missing: list[str]) -> None:
        """After one visit in a call of `load_state_dict`, add to its `missing_keys` what is `missing` there, unless
        another visit of the call has the entries or reported them already."""
        if missing_keys is not self._call:
            self._call, self._is_found, self._reported = missing_keys, False, []
        if not missing:
            self._is_found = True
            for key in self._reported:
                missing_keys.remove(key)
            self._reported = []
        elif not self._is_found and not self._reported:
            missing_keys.extend(missing)
            self._reported = missing

    def __reduce__(self) -> tuple[type[OneEntry], tuple[()]]:
        return type(self), ()


def _is_same(saved: Any, tensor: Tensor) -> bool:
    """Whether an entry of a state dict, which is detached, is this tensor. Meta tensors and those of subclasses, such
    as sharded ones, have no address to compare."""
    plain = (Tensor, nn.Parameter)
    if type(saved) not in plain or type(tensor) not in plain or tensor.is_meta:
        return True
    return bool(saved.data_ptr() == tensor.data_ptr())
