"""Timing of many calls on a machine with other load.

Its speed varies in phases of tenths of a second (measured: by a factor of 1.6 on a virtual machine). So all calls are
timed in rounds, which exposes them to the same phases, and the lower quartile of a call's times counts, which excludes
disturbed ones.
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

MAX_ROUNDS = 12
MIN_ROUNDS = 4  # must fit into the budget for a point to be included
MIN_POINTS = 8  # timed even beyond the budget: fewer do not suffice for a fit
OVERHEAD_US = 50.0  # per call, outside of the measured time

Call = Callable[[], None]
Timer = Callable[[Call], float]  # microseconds of a call


class Point(NamedTuple):
    """One kind of call, timed repeatedly."""

    size: float  # its time grows at most in proportion to this; the first point is the smallest
    prepare: Callable[[], Call]  # makes the next call; not timed


def device_timer(device: torch.device) -> Timer:
    """Timer of calls, including the work that they queue on the device."""
    return _cuda_us if device.type == "cuda" else _host_us


def time_points(
    points: Sequence[Point],
    timer: Timer,
    seconds: float,
    *,
    min_points: int = MIN_POINTS,
    max_rounds: int = MAX_ROUNDS,
) -> list[float]:
    """Times of the first points in microseconds: of as many as fit into `seconds`, but of `min_points` in any case.

    Decides by the results of `timer` only: ranks whose timers agree make the same calls in the same order.
    """
    budget_us, round_us = seconds * 1e6, 0.0
    times: list[list[float]] = []
    for index, point in enumerate(points):
        if index >= min_points:
            expected_us = _expected_us(point, points, times) + OVERHEAD_US
            if (round_us + expected_us) * MIN_ROUNDS > budget_us:
                break
        timer(point.prepare())  # warm-up: compiles, touches memory
        times.append([timer(point.prepare())])
        round_us += times[-1][0] + OVERHEAD_US
    rounds = _rounds([known[0] + OVERHEAD_US for known in times], budget_us - 2 * round_us, max_rounds)
    for turn in range(max(rounds)):
        # largest first: a small call suffers most if a much larger one before it has evicted the caches
        for index in reversed(range(len(times))):
            if _is_due(turn, rounds[index], max(rounds)):
                times[index].append(timer(points[index].prepare()))
    return [float(np.quantile(known, 0.25, method="lower")) for known in times]


def _expected_us(point: Point, points: Sequence[Point], times: Sequence[Sequence[float]]) -> float:
    """Upper bound on the time of a point: that of the largest timed point up to its size, in proportion."""
    known = [(other.size, known[0]) for other, known in zip(points, times, strict=False) if other.size <= point.size]
    size, time_us = max(known)
    return time_us * point.size / size


def _rounds(costs_us: Sequence[float], budget_us: float, max_rounds: int) -> list[int]:
    """Rounds of each call: equal shares of the budget; what cheap calls do not need goes to the others."""
    rounds = [0] * len(costs_us)
    for place, index in enumerate(sorted(range(len(costs_us)), key=lambda index: costs_us[index])):
        share_us = max(0.0, budget_us) / (len(costs_us) - place)
        rounds[index] = min(max_rounds, int(share_us / costs_us[index]))
        budget_us -= rounds[index] * costs_us[index]
    return rounds


def _is_due(turn: int, rounds: int, turns: int) -> bool:
    """Whether one of `rounds` rounds, spread evenly over `turns`, falls on this turn."""
    return (turn + 1) * rounds // turns > turn * rounds // turns


def spread(first: int, last: int, count: int) -> list[int]:
    """`count` sizes from `first` to `last` (at least `first`) in equal ratios. Small sizes may repeat."""
    return [round(size) for size in np.geomspace(first, max(first, last), count)]


def _host_us(call: Call) -> float:
    begin = perf_counter()
    call()
    return 1e6 * (perf_counter() - begin)


def _cuda_us(call: Call) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()  # type: ignore[no-untyped-call]
    call()
    end.record()  # type: ignore[no-untyped-call]
    end.synchronize()  # type: ignore[no-untyped-call]
    return 1e3 * float(begin.elapsed_time(end))  # type: ignore[no-untyped-call]
