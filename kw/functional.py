"""Computing one dynamic layer with the implementation that suits it and its batch.

Two choices are made for each layer and batch: how kernels are made, from the warehouse's "cells" or from "folded"
kernels (kw/compute/mixing.py); and how they are applied, by one of `kw.compute.IMPLEMENTATIONS`. All combinations are
exact and differ in time and memory. By default the cost model (kw/compute/cost.py) chooses; `use` and `set_default`
force a choice.

Shapes: `B` batch, `m` mixtures, `n` cells, `o` by `i` channels of a cell.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kw.compute import IMPLEMENTATIONS, MAKES, Geometry, assemble
from kw.compute.cost import Choice, Input, applies, best
from kw.compute.gathering import in_backward
from kw.compute.prices import device_kind
from kw.compute.tracing import is_recorded, is_transformed

__all__ = ["CHOICES", "Choice", "Setting", "assemble", "choose", "compute", "set_default", "setting_of", "use"]

AUTO = "auto"
CHOICES = (AUTO, *IMPLEMENTATIONS)  # how kernels are applied, for `use`


class Setting(NamedTuple):
    """How kernels are applied and made, if that is forced; else "auto"."""

    apply: str = AUTO
    make: str = AUTO


class _Thread(threading.local):
    setting: Setting | None = None  # of the innermost `use`


_thread = _Thread()
_default = Setting()
# The last setting that any thread entered. torch.compile compiles it in, and compiles again when it changes: it can
# guard a global variable, but not a thread's.
_latest = _default


@contextmanager
def use(apply: str = AUTO, make: str | None = None) -> Iterator[None]:
    """Force how layers are computed within a `with` block, in this thread: `with use("grouped"): ...`.

    The choice is made when a layer's forward pass begins. The backward pass may come after the block, also with
    activation checkpointing, which repeats the forward pass, because layers remember the setting.

    Args:
        apply: one of `CHOICES`. "grouped" is the reference, as in the release.
        make: "cells", "folded" or "auto". By default "auto" if `apply` is "auto", else "cells".

    If an implementation does not apply to a layer, "grouped" computes it; if kernels do not fold, they are made from
    cells. Compiled models (torch.compile) follow the last setting that any thread entered.

    Raises:
        ValueError: there is no such choice.
    """
    global _latest
    entered = _setting(apply, make)
    before = _thread.setting
    _thread.setting = _latest = entered
    try:
        yield
    finally:
        _thread.setting = before
        _latest = before or _default


def set_default(apply: str = AUTO, make: str | None = None) -> None:
    """Force how layers are computed from now on, in all threads, outside of `use` blocks. `set_default()` undoes that.
    Arguments and errors as in `use`."""
    global _default, _latest
    _default = _latest = _setting(apply, make)


def _setting(apply: str, make: str | None) -> Setting:
    make = make or (AUTO if apply == AUTO else MAKES[0])
    for name, value, known in (("apply", apply, CHOICES), ("make", make, (AUTO, *MAKES))):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not a known choice; there are {', '.join(known)}.")
    return Setting(apply, make)


def setting_of(layer: nn.Module) -> Setting:
    """The setting for a forward pass of `layer`. Within a backward pass, where activation checkpointing repeats a
    forward pass, it is the setting of the last forward pass before."""
    if torch.compiler.is_compiling():
        return _latest
    if in_backward():
        remembered: Setting | None = layer.__dict__.get("_setting")
        return remembered or _thread.setting or _default
    setting = _thread.setting or _default
    if torch.is_grad_enabled() or layer.training:
        layer.__dict__["_setting"] = setting
    return setting


def choose(
    setting: Setting,
    x: Tensor,
    cells: Tensor,
    geometry: Geometry,
    features: int | None = None,
    needs_grad: bool = False,
    makes: tuple[str, ...] = MAKES,
) -> Choice:
    """How to compute a layer: as forced, if that applies, or else as is expected to be fastest.

    Args:
        x: the layer's input, `(B, C_in, *space)`.
        cells: `(n, o, i)`, or a basis for each mixture, `(J, m, o, i)`.
        features: the attention's hidden width H if its scores are affine; None if they are not, so that kernels do not
            fold.
        needs_grad: whether the attentions need a gradient.
        makes: how kernels can be made.
    """
    if features is None:
        makes = makes[:1]
    if is_recorded(x.shape) or is_transformed():
        return _for_tools(setting, x, geometry, makes)
    if setting.apply != AUTO and setting.make != AUTO:
        make = setting.make if setting.make in makes else makes[0]
        return Choice(make, setting.apply) if applies(setting.apply, make, x, geometry) else Choice(makes[0], "grouped")
    step = torch.is_grad_enabled() and (needs_grad or x.requires_grad or cells.requires_grad)
    names, plain = tuple(IMPLEMENTATIONS) if setting.apply == AUTO else (setting.apply,), "grouped"
    if torch.compiler.is_compiling() and setting.apply == AUTO:
        # Where sizes vary, torch's compiler fails to lay out a convolution with a number of groups that varies.
        names, plain = tuple(name for name in names if name != plain), "batched"
    makes = makes if setting.make == AUTO else tuple(make for make in makes if make == setting.make) or makes[:1]
    compiling = torch.compiler.is_compiling()  # torch.compile cannot look into caches
    possible = (_possible if compiling else _seen)(names, makes, Input(x.shape, x.dtype, x.device), geometry)
    possible = possible or tuple(Choice(make, plain) for make in makes)
    return (best if compiling else _remembered)(
        possible, tuple(x.shape), tuple(cells.shape), geometry, features or 0, step, device_kind(x.device)
    )


def _for_tools(setting: Setting, x: Tensor, geometry: Geometry, makes: tuple[str, ...]) -> Choice:
    """The choice where operations are recorded or transformed (kw/compute/tracing.py): as forced if that can be, or
    else "batched". Custom operators can be recorded, and are then needed to run it."""
    make = setting.make if setting.make in makes else makes[0]
    possible = ("blocks", "triton") if is_recorded(x.shape) else ("grouped", "inputs")
    kept = setting.apply in possible and applies(setting.apply, make, x, geometry)
    return Choice(make, setting.apply if kept else "batched")


def _possible(names: tuple[str, ...], makes: tuple[str, ...], x: Input, geometry: Geometry) -> tuple[Choice, ...]:
    return tuple(Choice(make, name) for make in makes for name in names if applies(name, make, x, geometry))


# Looking for the choices of a small layer, and comparing them, takes as long as computing it.
_seen = lru_cache(maxsize=4096)(_possible)
_remembered = lru_cache(maxsize=4096)(best)


def compute(
    x: Tensor, weights: Tensor, basis: Tensor, geometry: Geometry, apply: str, bias: Tensor | None = None
) -> Tensor:
    """Convolve `(B, C_in, *space)` with one kernel per sample and add a static bias `(C_out,)`, to `(B, C_out, *out)`.

    Args:
        weights, basis: from which each sample's mixtures are made (kw/compute/mixing.py), such as attentions
            `(B, m, n)` and cells `(n, o, i)`.
        geometry: of the layer. Mixture `(p, a, b)` of its grid is the kernel's cell at position p, row `a * o`, column
            `b * i`.
        apply: the implementation, one of `kw.compute.IMPLEMENTATIONS` that applies.
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        # Autocast does not reach into functions that define their backward pass.
        x = x.to(torch.get_autocast_dtype(kind))
    remade = apply in ("blocks", "triton")  # these compute in the input's dtype, and add up gradients in the basis's
    if not remade:
        weights, basis = weights.to(x.dtype), basis.to(x.dtype)
    out = IMPLEMENTATIONS[apply](x, weights, basis, geometry)
    if bias is None:
        return out
    bias = bias.to(out.dtype).view(-1, *(1,) * (out.dim() - 2))
    # In place saves an allocation, but where `out` is a view that needs a gradient, autograd would copy the gradient.
    in_place = (remade or not out.requires_grad) and not is_transformed()  # vmap may have only the bias in its batch
    return out.add_(bias) if in_place else out + bias
