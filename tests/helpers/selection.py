"""Which cases of a test `make test` runs, and which only `make test-all` does, by the mark `slow`.

What holds for each backbone and for each setting hardly ever fails for one pair of them alone: `make test` takes each
of both once, `make test-all` all pairs.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product

import pytest


def representative(cases: Iterable, often: Callable[..., bool]) -> list:
    """The cases, for `parametrize`; slow are those for which `often(*case)` is false."""
    made = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        made.append(pytest.param(*values, marks=() if often(*values) else pytest.mark.slow))
    return made


def paired(*axes: Iterable) -> list:
    """The product of `axes`, for `parametrize`; not slow are as many cases as the longest axis is long.

    Each value of each axis is in one of those. A shorter axis begins again, and is then shifted, so that its values
    meet others than the first time.
    """
    values: list[Sequence] = [list(axis) for axis in axes]
    often = {
        tuple((number + place * (number // len(axis))) % len(axis) for place, axis in enumerate(values))
        for number in range(max(map(len, values)))
    }
    return [
        pytest.param(
            *(axis[k] for axis, k in zip(values, case, strict=True)), marks=() if case in often else pytest.mark.slow
        )
        for case in product(*(range(len(axis)) for axis in values))
    ]
