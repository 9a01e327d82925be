"""The min-max problem: on which devices do the lanes of new sequences live, so that the slowest device is fastest?

J sequences, N devices, G lanes per sequence. One pipeline stage is decided at a time. The first devices are the homes
of the head groups, the others are attention workers. With x_ji lanes of sequence j on device i, and y_i = 1 if any:

    minimise    T
    subject to  sum_i x_ji = G                                                   every lane lives somewhere    for all j
                max(floor_i, start_i + sum_j lane_us_ji x_ji) <= T  if y_i = 1   no used device takes longer   for all i
                sum_j pages_ji x_ji <= free_pages_i                              the lanes fit                 for all i
                0 <= x_ji <= most_lanes_i, integer                               a home takes its own lanes only

Lanes of one sequence are alike, so this says everything: a home with G_h groups has most_lanes = G_h, a worker G, and
any such x can be turned into owners of head groups. The floor and the constants in `start_us` of a device that is idle
count only if it is used; a busy device that gets nothing has no part in T (it could not be helped anyway).
"""

from collections.abc import Iterable
from functools import reduce
from operator import add, mul

import msgspec

Counts = list[list[int]]  # [N][J] lanes
UNLIMITED = 1 << 40  # free pages, where memory is no matter


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Times are microseconds for one layer. Homes come first among the devices: ties go to the first."""

    num_lanes: int  # G, of each sequence
    num_homes: int
    start_us: list[float]  # [N] of a device that is used: what it holds already, its constants, its link's latency
    floor_us: list[float]  # [N] least time of a device that is used
    lane_us: list[list[float]]  # [N][J] each lane more, > 0
    most_lanes: list[int]  # [N] of one sequence
    home_pages: list[int]  # [J] of a lane that lives at home
    worker_pages: list[int]  # [J] of one that lives on a worker
    free_pages: list[int]  # [N], >= 0

    @property
    def num_sequences(self) -> int:
        return len(self.home_pages)

    @property
    def num_devices(self) -> int:
        return len(self.start_us)

    def pages(self, device: int) -> list[int]:
        """[J] pages of a lane on a device."""
        return self.home_pages if device < self.num_homes else self.worker_pages


def added(values: Iterable[float]) -> float:
    """From left to right. `sum` rounds less from Python 3.12 on, and placements must not depend on the version."""
    return reduce(add, values, 0.0)


def peak_us(problem: Problem, counts: Counts) -> float:
    """T: the time of the slowest device among those that get lanes."""
    return max(times_us(problem, counts), default=0.0)


def times_us(problem: Problem, counts: Counts) -> list[float]:
    """Time of each device; 0 for those that get no lanes."""
    return [
        max(floor, start + added(map(mul, held, lane_us))) if any(held) else 0.0
        for held, lane_us, start, floor in zip(counts, problem.lane_us, problem.start_us, problem.floor_us, strict=True)
    ]


def longest_first(problem: Problem) -> list[int]:
    """Sequences in the order of what their lanes cost, ties in the order they came."""
    cost_us = [-added(costs) for costs in zip(*problem.lane_us, strict=True)]
    return sorted(range(problem.num_sequences), key=cost_us.__getitem__)


def helpful(problem: Problem, limit_us: float) -> list[int]:
    """Devices that can take a lane within `limit_us`, if they have the pages."""
    return [
        device
        for device, (start, floor, most) in enumerate(
            zip(problem.start_us, problem.floor_us, problem.most_lanes, strict=True)
        )
        if start < limit_us and floor <= limit_us and most
    ]
