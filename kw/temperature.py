"""The temperature tau of a model's attentions (paper, section 3.3): one tensor for all of them, 1 when training begins
and 0 once it is warmed up.

A state dict has it once, under the name of the first attention.

Moving averages of weights (timm's ModelEma, torch's AveragedModel, ultralytics' ModelEMA) write into a copy of the
model in place, the temperature too. But an average of temperatures is the temperature of no model. So where somebody
wrote another value into a deep copy's temperature than `set` or loading left there, the copy takes the temperature of
the model that it was copied from, as long as that exists. Otherwise a copy is independent of its original.
In a compiled model this happens when it is next read outside of the compiled part, such as by `state_dict`.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from kw.frozen import refuse_frozen
from kw.owners import OneEntry


class Temperature(nn.Module):
    """One temperature, for all attentions that hold this module: `read()`, a scalar on their device.

    It notes what it was set to, and at which version of the tensor: then it knows without waiting for the device
    whether it is 0, and whether somebody else wrote into it.
    """

    value: Tensor  # as it is; `read` and `is_zero` first settle what others wrote into it
    is_noted_zero: bool

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()), persistent=False)  # attentions save it
        self.entry = OneEntry()
        self.has_warned = False  # of a batch of one (kw/attention.py): once in a model
        self._source: weakref.ref[Temperature] | None = None  # that of the model that this one was copied from
        self._note(0.0)

    def read(self) -> Tensor:
        """tau, `()`."""
        self._settle()
        return self.value

    @property
    def is_zero(self) -> bool:
        """Whether tau is known to be 0, without waiting for the device; then the anchors can be left out. In compiled
        models, only `set` and loading make it known."""
        if torch.compiler.is_compiling():
            return self.is_noted_zero
        self._settle()
        return self.is_noted_zero and self._noted_of() is self.value

    def set(self, tau: float) -> None:
        """Set it in place."""
        self.value.fill_(tau)
        self._note(tau)

    def load(self, value: Tensor, assign: bool) -> None:
        """Take over a saved temperature; `assign` as in `nn.Module.load_state_dict`."""
        if assign or self.value.is_meta:
            self.value = value.detach().clone()
        else:
            self.value.copy_(value)
        self._note(None if value.is_meta else float(value))

    def _note(self, noted: float | Tensor | None, is_zero: bool = False) -> None:
        """Note what the tensor holds: a number, a copy on its device, or None if it is not known."""
        self._noted = noted
        self.is_noted_zero = is_zero or (isinstance(noted, float | int) and noted == 0)
        self._noted_of = weakref.ref(self.value)
        self._noted_at = _version(self.value)

    def _settle(self) -> None:
        """If somebody wrote into the tensor, decide what that was, without waiting for the device."""
        if torch.compiler.is_compiling() or self._noted_of() is not self.value:
            return  # another tensor, by torch.func or DataParallel: it is what they say
        if self._noted_at == _version(self.value):
            return
        source = self._source() if self._source is not None else None
        is_zero = False
        if source is not None and self._noted is not None:
            with torch.no_grad():
                theirs = source.read().to(self.value, non_blocking=True)
                self.value.copy_(torch.where(self.value == self._noted, self.value, theirs))
            is_zero = self.is_noted_zero and source.is_zero
        if type(self.value) is Tensor and self.value.device.type == "cpu":
            self._note(float(self.value))
        else:
            self._note(self.value.clone(), is_zero)

    def _apply(self, fn: Any, recurse: bool = True) -> Temperature:
        self._settle()
        before = self.value
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self._noted, Tensor):
            self._noted = fn(self._noted)
        elif self._noted is not None and self.value is not before and not self.value.is_meta:
            self.value.fill_(self._noted)  # `to_empty` leaves what was in memory
        self._note(self._noted, self.is_noted_zero)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**self.__dict__, "_noted_of": None, "_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._note(self._noted, self.is_noted_zero)

    def __deepcopy__(self, memo: dict[int, Any]) -> Temperature:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._source = weakref.ref(self)
        return copied

    def __float__(self) -> float:
        return float(self.read())


def _version(value: Tensor) -> int:
    """How often a tensor was written to; 0 for tensors made in inference mode, which have no counter."""
    return 0 if value.is_inference() else value._version


class Tempered(nn.Module):
    """A part of a dynamic layer that depends on the temperature, which it saves under the name `temperature`. Parts
    that share a temperature save it once, under the first one's name, and load it under any."""

    shared: Temperature

    def __init__(self) -> None:
        super().__init__()
        self.shared = Temperature()

    @property
    def temperature(self) -> Tensor:
        return self.shared.read()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shared.entry.is_new(destination, prefix, "temperature", self.shared.value):
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
            if strict:
                self.shared.entry.report(missing_keys, [key])
            return
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        self.shared.entry.report(missing_keys, [])
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
