"""The temperature tau of a model's attentions (paper, section 3.3): one tensor for all of them, 1 when training begins
and 0 once it is warmed up.

Each attention saves it, so a state dict has it once for each attention. An average of a state dict's entries in place,
such as timm's ModelEmaV3, averages it each time: call `kw.set_temperature(average, tau)` after each update.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from kw.frozen import refuse_frozen


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
        """Whether tau is known to be 0, without waiting for the device; then the anchors can be left out. In compiled
        models, only `set` and loading make it known."""
        if torch.compiler.is_compiling():
            return self._zero_at is not None
        known = self._zero_of is not None and self._zero_of() is self.value
        return known and self._zero_at == _version(self.value)

    def set(self, tau: float) -> None:
        """Set it in place."""
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
    """How often a tensor was written to; 0 for tensors made in inference mode, which have no counter."""
    return 0 if value.is_inference() else value._version


class Tempered(nn.Module):
    """A part of a dynamic layer that depends on the temperature, which it saves under the name `temperature`."""

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


def set_temperature(model: nn.Module, tau: float) -> None:
    """Set the temperature of every attention in `model`: 1 when training begins, 0 after the warm-up.

    In a warehouse's layers, 1 anchors each mixture to its cell and 0 leaves it free. `kw.baselines` says what it means
    to the layers there.

    Raises:
        ValueError: tau is not in [0, 1], no attention of the model has a temperature, or the model is frozen.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"temperature {tau!r} must be between 0 (trained) and 1 (start of the warm-up).")
    refuse_frozen(model, "keeps its temperature")
    found = temperatures(model)
    if not found:
        raise ValueError(
            f"This {type(model).__name__} has no dynamic layer to set a temperature of; kw.convert it first "
            f"(or its method has no temperature)."
        )
    for temperature in found:
        temperature.set(tau)


def share_temperature(model: nn.Module) -> None:
    """Make all parts of `model` that depend on a temperature use the same one."""
    tempered = [module for module in model.modules() if isinstance(module, Tempered)]
    for module in tempered:
        module.shared = tempered[0].shared


def temperatures(model: nn.Module) -> list[Temperature]:
    """The temperatures of a model's dynamic layers: one, or several if the model was composed of several models; none
    if its method has no temperature."""
    return list(dict.fromkeys(module.shared for module in model.modules() if isinstance(module, Tempered)))
