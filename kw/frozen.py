"""The mark of a frozen model (`kw.freeze`), and what a frozen model refuses: to train, and to be changed again."""

from __future__ import annotations

from typing import Any

from torch import nn


def mark_frozen(module: nn.Module) -> None:
    """Set `module.is_frozen`, and let the module refuse a forward pass in training mode."""
    module.is_frozen = True  # type: ignore[assignment]
    module.register_forward_pre_hook(_refuse_training)


def refuse_frozen(model: nn.Module, reason: str) -> None:
    """Raises ValueError if `model` or a part of it is frozen; the message says that it "is frozen and `reason`"."""
    if any(vars(module).get("is_frozen") is True for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} is frozen and {reason}: kw.freeze changes a model for good. "
            f"Keep the original, and freeze a copy: kw.freeze(copy.deepcopy(model))."
        )


def _refuse_training(module: nn.Module, args: Any) -> None:
    if module.training:
        raise RuntimeError(
            f"This {type(module).__name__} was frozen for evaluation and cannot run in training mode: call "
            f"model.eval(). To continue training, keep the original, and freeze a copy: "
            f"kw.freeze(copy.deepcopy(model))."
        )
