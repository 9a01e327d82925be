"""Timing many calls on a machine that has other things to do.

Its speed comes and goes in phases of tenths of a second (measured: a factor 1.6 on a virtual machine). So calls are
timed in rounds, and the lower quartile of a call's times counts: all calls are seen in the same phases, and the
undisturbed ones decide.
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

MOST_ROUNDS = 12
LEAST_ROUNDS = 4  # that must fit the budget for a point to be let in
LEAST_POINTS = 8  # that are timed whatever they take: fewer give no fit
OVERHEAD_US = 50.0  # of a call, between the times that are taken

Call = Callable[[], None]
Timer = Callable[[Call], float]  # a call's microseconds


class Point(NamedTuple):
    """One thing to be timed, again and again."""

    size: float  # its time grows no faster than in proportion to this; the first point's is the smallest
    prepare: Callable[[], Call]  # makes the next call; not timed


def device_timer(device: torch.device) -> Timer:
    """Until the device has done what the call asks of it."""
    return _cuda_us if device.type == "cuda" else _host_us


def time_points(
    points: Sequence[Point],
    timer: Timer,
    seconds: float,
    *,
    least: int = LEAST_POINTS,
    most_rounds: int = MOST_ROUNDS,
) -> list[float]:
    """Microseconds of the first points: of as many as `seconds` allow, but of `least` whatever they take.

    Decides by what `timer` says alone: ranks whose timers agree make the same calls in the same order.
    """
    budget_us, round_us = seconds * 1e6, 0.0
    times: list[list[float]] = []
    for index, point in enumerate(points):
        if index >= least:
            expected_us = _expected_us(point, points, times) + OVERHEAD_US
            if (round_us + expected_us) * LEAST_ROUNDS > budget_us:
                break
        timer(point.prepare())  # compiles, touches memory
        times.append([timer(point.prepare())])
        round_us += times[-1][0] + OVERHEAD_US
    rounds = _rounds([known[0] + OVERHEAD_US for known in times], budget_us - 2 * round_us, most_rounds)
    for turn in range(max(rounds)):
        # downwards: the small ones are the ones to suffer if a large one before them has emptied the caches
        for index in reversed(range(len(times))):
            if _is_due(turn, rounds[index], max(rounds)):
                times[index].append(timer(points[index].prepare()))
    return [float(np.quantile(known, 0.25, method="lower")) for known in times]


def _expected_us(point: Point, points: Sequence[Point], times: Sequence[Sequence[float]]) -> float:
    """At most: that of the largest known point that is not larger, in proportion."""
    known = [(other.size, known[0]) for other, known in zip(points, times, strict=False) if other.size <= point.size]
    size, time_us = max(known)
    return time_us * point.size / size


def _rounds(costs_us: Sequence[float], budget_us: float, most: int) -> list[int]:
    """How often each is timed: all have the same time, and what the cheap ones do not need goes to the others."""
    rounds = [0] * len(costs_us)
    for place, index in enumerate(sorted(range(len(costs_us)), key=lambda index: costs_us[index])):
        share_us = max(0.0, budget_us) / (len(costs_us) - place)
        rounds[index] = min(most, int(share_us / costs_us[index]))
        budget_us -= rounds[index] * costs_us[index]
    return rounds


def _is_due(turn: int, rounds: int, turns: int) -> bool:
    """Whether one of `rounds` that are spread over `turns` falls on this turn."""
    return (turn + 1) * rounds // turns > turn * rounds // turns


def spread(first: int, last: int, count: int) -> list[int]:
    """`count` sizes from `first` to `last` (at least `first`) in equal ratios. Small ones may repeat."""
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
