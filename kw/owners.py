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

from torch import nn


class Owners:
    """The layers that have registered a module as theirs, in the order in which they did. It does not keep them alive.
    Copies of the layers register themselves again."""

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
    """Saves a shared module's entries under one name, and loads them under any of its names."""

    def __init__(self) -> None:
        self._saved: tuple[weakref.ref[dict[str, Any]], str] | None = None
        self._call: MutableSequence[str] | None = None  # a call's list of missing keys, by which calls are told apart
        self._is_found = False
        self._reported: list[str] = []

    def is_new(self, destination: dict[str, Any], prefix: str) -> bool:
        """Whether `destination`, the state dict that is being made, has no entries of the module under another
        prefix."""
        if self._saved is not None and self._saved[0]() is destination and self._saved[1] != prefix:
            return False
        try:
            self._saved = weakref.ref(destination), prefix
        except TypeError:  # a plain dict, to which there are no weak references
            self._saved = None
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
