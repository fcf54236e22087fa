"""Names of runs. They follow from the values of settings, not from how somebody typed them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

MAX_NAME = 120


def extended(name: str, changes: Mapping[str, Any]) -> str:
    """`resnet18_kw1d4x` and `{"recipe.lr": 0.1}` to `resnet18_kw1d4x+recipe.lr-0.1`. Neither a shell nor Hydra needs
    quotes for it."""
    for key in sorted(changes):
        name += re.sub(r"[^\w.+-]+", "_", f"+{key}-{_text(changes[key])}")
    return shorten(name)


def differences(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `after` with another value in `before`; None where only `before` has them."""
    return {key: after.get(key) for key in after.keys() | before.keys() if not same(after.get(key), before.get(key))}


def same(one: Any, other: Any) -> bool:
    """Whether two settings have the same value: `0.25` and `"1/4"` do."""
    return bool(_exact(one) == _exact(other))


def shorten(name: str, length: int = MAX_NAME) -> str:
    """Cut a long name, and end it with a hash of all of it."""
    return name if len(name) <= length else f"{name[:length]}+{hashlib.sha1(name.encode()).hexdigest()[:8]}"


def _exact(value: Any) -> Any:
    if isinstance(value, bool):  # which equals 0 or 1
        return str(value)
    if not isinstance(value, int | float | str):
        return value
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        return value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"  # 1.0 as 1, which is how one types it
    return value if isinstance(value, str) else json.dumps(value, default=str)
