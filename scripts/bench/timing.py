"""The one loop in which calls are timed: they take turns in changing order, so that other load on the machine affects
all of them alike. The clock is that of torch.utils.benchmark, which waits for the GPU.
"""

from __future__ import annotations

import itertools
import sys
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch.utils.benchmark

Call = Callable[[], object]
Clock = Callable[[], float]
clock_of_torch: Clock = torch.utils.benchmark.timer
WARM_UP = {"cpu": 1, "cuda": 3}  # rounds that do not count: a GPU's first calls compile kernels and get memory


@dataclass(frozen=True)
class Sample:
    """Seconds (or bytes) of each round, or the error in place of them."""

    values: tuple[float, ...]
    error: str = ""

    @property
    def median(self) -> float:
        return median(self.values)

    def quartiles(self) -> tuple[float, float, float]:
        if len(self.values) == 1:
            return self.values * 3
        low, middle, high = quantiles(self.values, n=4, method="inclusive")
        return low, middle, high


def in_turns(
    calls: Mapping[str, Call],
    rounds: int,
    seconds: float = float("inf"),
    fewest: int = 1,
    warm_up: int = 1,
    times: int = 1,
    before_each: Call = lambda: None,
    clock: Clock = clock_of_torch,
) -> dict[str, Sample]:
    """Time the calls in rounds. One that raises takes no part in the rounds after it; its sample has the error.

    Args:
        rounds: at most, after those to warm up.
        seconds: after which no round begins, once there are the `fewest`.
        times: calls in a row for one value, which is their mean.
        before_each: is called before each value, and not timed.
        clock: `time.process_time` does not count what other processes take meanwhile.
    """
    values: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    orders = itertools.cycle(itertools.permutations(calls) if len(calls) < 5 else _rotations(list(calls)))
    began = time.perf_counter()
    for turn in range(-warm_up, rounds):
        if turn == 0:
            began = time.perf_counter()
        if turn >= fewest and time.perf_counter() - began > seconds:
            break
        number = times if turn >= 0 else 1
        for name in next(orders):
            if name in errors:
                continue
            try:
                timer = timeit.Timer(calls[name], before_each, clock)
                values[name].append(timer.timeit(number) / number)
            except Exception as error:  # most likely out of memory; the table reports whatever it is
                errors[name] = message(error)
    return {
        name: Sample((), errors[name]) if name in errors else Sample(tuple(values[name][warm_up:])) for name in calls
    }


def _rotations(names: list[str]) -> list[tuple[str, ...]]:
    """Of many calls there are too many permutations. In these orders each call is first in turn, and has two
    neighbors."""
    return [(*order[k:], *order[:k]) for order in (names, names[::-1]) for k in range(len(names))]


def medians(samples: Mapping[str, Sample]) -> list[float]:
    """Of each sample, in seconds. Exits with the first error, if there is one."""
    for name, sample in samples.items():
        if sample.error:
            sys.exit(f"{name}: {sample.error}")
    return [sample.median for sample in samples.values()]


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def rounded(value: float) -> float:
    """To four significant digits: decimals would round a detector's images per second on a CPU to zero."""
    return float(f"{value:.4g}")
