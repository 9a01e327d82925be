"""The placement problem: which devices hold the lanes of new sequences, so that the slowest device takes least time.

Generalised assignment on unrelated machines with capacities; the objective is the makespan. J sequences, N devices, G
lanes per sequence, one pipeline stage. The first devices are the homes of the head groups, the others are attention
workers. With x_ji lanes of sequence j on device i, and y_i = 1 if device i gets any lane:

    minimise    T
    subject to  sum_i x_ji = G                                                   all lanes are placed         for all j
                max(floor_i, start_i + sum_j lane_us_ji x_ji) <= T  if y_i = 1   no used device takes longer  for all i
                sum_j pages_ji x_ji <= free_pages_i                              the lanes fit into memory    for all i
                0 <= x_ji <= most_lanes_i, integer                               a home takes its own lanes only

The lanes of one sequence cost the same, so counts suffice: with most_lanes = G_h for a home of G_h groups and G for a
worker, any feasible x can be turned into owners of head groups. `start_us` and `floor_us` of a device count only if
it gets a lane: a busy device that gets none has no part in T, since no placement could make it faster.
"""

from operator import mul

import msgspec

Counts = list[list[int]]  # [N][J] lanes
UNLIMITED = 1 << 40  # free pages of a device whose memory is ignored


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Times are microseconds for one layer. Homes come first among the devices, and ties go to the first device."""

    num_lanes: int  # G
    num_homes: int
    start_us: list[float]  # [N] time before the first new lane: lanes held, constants, latency of the link
    floor_us: list[float]  # [N] least time of a device that is used
    lane_us: list[list[float]]  # [N][J] time that one lane adds, > 0
    most_lanes: list[int]  # [N] of one sequence
    home_pages: list[int]  # [J] pages that a lane takes at home
    worker_pages: list[int]  # [J] pages that a lane takes on a worker
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


def makespan_us(problem: Problem, counts: Counts) -> float:
    """T: the time of the slowest device among those that get lanes."""
    times_us = [
        max(floor, start + sum(map(mul, held, lane_us)))
        for held, lane_us, start, floor in zip(counts, problem.lane_us, problem.start_us, problem.floor_us, strict=True)
        if any(held)
    ]
    return max(times_us, default=0.0)
