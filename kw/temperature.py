"""The temperature tau of a model's attentions (paper, section 3.3): one tensor for all of them, 1 when training begins
and 0 once it is warmed up.

Each attention saves it, so it is in a state dict once for each of them. What averages a state dict's entries in place,
such as timm's ModelEmaV3, averages it as often: call `kw.set_temperature(average, tau)` after each update.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """One temperature, for all attentions that hold this module: `value`, a scalar on their device."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()), persistent=False)  # each attention saves it
        # Which tensor, at which version, is known to be 0.
        self._zero_of: weakref.ref[Tensor] | None = weakref.ref(self.value)
        self._zero_at: int | None = _version(self.value)

    @property
    def is_zero(self) -> bool:
        """Whether tau is known to be 0, without waiting for the device. Then what it is for costs nothing. Compiled
        models know it of `set` and of loading alone."""
        if torch.compiler.is_compiling():
            return self._zero_at is not None
        known = self._zero_of is not None and self._zero_of() is self.value
        return known and self._zero_at == _version(self.value)

    def set(self, tau: float) -> None:
        self.value.fill_(tau)
        self._note(tau == 0)

    def load(self, value: Tensor, assign: bool) -> None:
        """Take over a saved temperature; `assign` as in `nn.Module.load_state_dict`."""
        if assign or self.value.is_meta:
            self.value = value.detach().clone()
        else:
            self.value.copy_(value)
        self._note(not value.is_meta and float(value) == 0)

    def _note(self, is_zero: bool) -> None:
        self._zero_of = weakref.ref(self.value) if is_zero else None
        self._zero_at = _version(self.value) if is_zero else None

    def _apply(self, fn: Any, recurse: bool = True) -> Temperature:
        was_zero = self.is_zero
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_zero and not self.value.is_meta:
            self.value.zero_()  # `to_empty` leaves what was in memory
        self._note(was_zero)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zero_at": self.is_zero, "_zero_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._note(state["_zero_at"])


def _version(value: Tensor) -> int:
    """How often a tensor was written to; tensors made in inference mode do not count."""
    return 0 if value.is_inference() else value._version


class Tempered(nn.Module):
    """A part of a dynamic layer that depends on the temperature. It saves it, under the name `temperature`."""

    shared: Temperature

    def __init__(self) -> None:
        super().__init__()
        self.shared = Temperature()

    @property
    def temperature(self) -> Tensor:
        return self.shared.value

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "temperature"] = self.temperature

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "temperature"
        if key not in state_dict:
            missing_keys.extend([key] if strict else [])
            return
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        self.shared.load(state_dict[key], local_metadata.get("assign_to_params_buffers", False))


def share_temperature(model: nn.Module) -> None:
    """Let all parts of `model` that depend on a temperature have the same."""
    tempered = [module for module in model.modules() if isinstance(module, Tempered)]
    for module in tempered:
        module.shared = tempered[0].shared


def temperatures(model: nn.Module) -> list[Temperature]:
    """The temperatures of a model's dynamic layers: one, unless it was put together of several models; none, if its
    layers are of a kind without."""
    return list(dict.fromkeys(module.shared for module in model.modules() if isinstance(module, Tempered)))
