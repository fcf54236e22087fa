"""Timing of calls, on a CPU or a GPU: what the benchmarks here share.

Calls that are compared take turns in changing order, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Call = Callable[[], object]
Clock = Callable[[], float]
WARM_UP = {"cpu": 1, "cuda": 3}  # rounds that do not count: a GPU's first calls compile kernels and get memory


@dataclass(frozen=True)
class Sample:
    """What the rounds gave, in seconds or bytes; or why there is nothing."""

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


def seconds_of(call: Call, device: str, times: int = 1, clock: Clock = time.perf_counter) -> float:
    """Of one of `times` calls in a row, by the clock. On a GPU between two events, so until the device is done: the
    host may be ahead of it by some calls, as it is within a model."""
    if device != "cuda":
        began = clock()
        for _ in range(times):
            call()
        return (clock() - began) / times
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    for _ in range(times):
        call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / times


def repeated(call: Call, device: str, rounds: int, warm_up: int | None = None) -> list[float]:
    """Seconds of each round after those to warm up."""
    warm_up = WARM_UP[device] if warm_up is None else warm_up
    return [seconds_of(call, device) for _ in range(warm_up + rounds)][warm_up:]


def by_turns(
    calls: Mapping[str, Call],
    device: str,
    rounds: int,
    seconds: float = float("inf"),
    fewest: int = 1,
    warm_up: int | None = None,
    times: int = 1,
    before_each: Call | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Sample]:
    """Time the calls in rounds. One that fails is left out of the rounds after it, and told.

    Args:
        rounds: at most, after those to warm up.
        seconds: after which no round is begun, once there are the `fewest`.
        times: calls in a row for one value.
        before_each: done before each call, and not timed.
        clock: of a CPU: `time.process_time` leaves out what other processes took meanwhile.
    """
    values: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    orders = itertools.cycle(itertools.permutations(calls) if len(calls) < 5 else _rotations(list(calls)))
    warm_up = WARM_UP[device] if warm_up is None else warm_up
    began = time.perf_counter()
    for turn in range(-warm_up, rounds):
        if turn == 0:
            began = time.perf_counter()
        if turn >= fewest and time.perf_counter() - began > seconds:
            break
        for name in next(orders):
            if name in errors:
                continue
            if before_each is not None:
                before_each()
            try:
                values[name].append(seconds_of(calls[name], device, times if turn >= 0 else 1, clock))
            except Exception as error:  # most likely out of memory; whatever it is, the table tells it
                errors[name] = message(error)
    return {
        name: Sample((), errors[name]) if name in errors else Sample(tuple(values[name][warm_up:])) for name in calls
    }


def _rotations(names: list[str]) -> list[tuple[str, ...]]:
    """Of many calls, all orders would be too many: in these each one is the first in turn, and has two neighbours."""
    return [(*order[k:], *order[:k]) for order in (names, names[::-1]) for k in range(len(names))]


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
