"""Plain insertion: each lane goes to the device that then takes least time. Exact for one sequence (`problem.py`)."""

from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace
from math import inf

from hetis.dispatcher.problem import Counts, Problem


class InsertionSolver:
    """The `Solver` where the C++ extension is not built: for several sequences a heuristic, within no proven factor."""

    def solve(self, problem: Problem) -> Counts | None:
        """See `Solver`. Sequences are inserted longest first."""
        return insert(problem, longest_first(problem))

    def lower_bound_us(self, problem: Problem, reached_us: float, enough_us: float = inf) -> float:
        """See `Solver`. Memory is ignored.

        Weak duality with fixed prices p_i, one over the time that a lane of every sequence takes on device i. Each lane
        costs at least min_i p_i lane_us_ji, and device i can offer p_i (T - start_i), so T is at least the level at
        which all devices together offer what all lanes cost. Tight where devices differ by a factor alone.
        """
        usable = [
            (start_us, lane_us)
            for start_us, floor_us, lane_us, most in zip(
                problem.start_us, problem.floor_us, problem.lane_us, problem.most_lanes, strict=True
            )
            if most and start_us < reached_us and floor_us <= reached_us
        ]
        if not usable:  # a lane so short that it does not show in floating point
            return reached_us
        prices = [1 / sum(lane_us) for _, lane_us in usable]
        priced = ([price * us for us in lane_us] for price, (_, lane_us) in zip(prices, usable, strict=True))
        cost = problem.num_lanes * sum(map(min, zip(*priced, strict=True)))
        level_us = _level(cost, sorted((start_us, price) for price, (start_us, _) in zip(prices, usable, strict=True)))
        bound_us = min(level_us, reached_us)  # rounding may lift it above
        return inf if bound_us > enough_us else bound_us


def _level(cost: float, devices: list[tuple[float, float]]) -> float:
    """T with sum_i price_i max(0, T - start_i) = cost. `devices`: (start, price), ascending."""
    level_us, total, sum_prices = 0.0, cost, 0.0
    for start_us, price in devices:
        if sum_prices and level_us <= start_us:
            break
        total += price * start_us
        sum_prices += price
        level_us = total / sum_prices
    return level_us


def longest_first(problem: Problem) -> list[int]:
    """Sequences in descending order of their lanes' time, summed over the devices; ties in order of arrival."""
    cost_us = [-sum(costs) for costs in zip(*problem.lane_us, strict=True)]
    return sorted(range(problem.num_sequences), key=cost_us.__getitem__)


def insert(problem: Problem, order: Iterable[int]) -> Counts | None:
    """Places one sequence after the other; None if one of them finds no pages.

    Exact for one sequence: the time of device i with n lanes rises with n, so T is the G-th smallest among the times of
    all (i, n), and the lanes taken are the G smallest.
    """
    busy_us, free = list(problem.start_us), list(problem.free_pages)
    counts: Counts = [[0] * problem.num_sequences for _ in busy_us]
    for j in order:
        if not _insert_one(problem, j, busy_us, free, counts):
            return None
    return counts


def _insert_one(problem: Problem, j: int, busy_us: list[float], free: list[int], counts: Counts) -> bool:
    """Places the lanes of sequence j, in `busy_us`, `free` and `counts`; False if they do not fit."""
    floor_us, most = problem.floor_us, problem.most_lanes
    lane_us = [costs[j] for costs in problem.lane_us]
    pages = [problem.pages(device)[j] for device in range(problem.num_devices)]
    places = [
        (max(floor_us[device], busy_us[device] + cost_us), device)
        for device, cost_us in enumerate(lane_us)
        if most[device] and pages[device] <= free[device]
    ]
    heapify(places)
    for _ in range(problem.num_lanes):
        if not places:
            return False
        device = places[0][1]
        busy_us[device] += lane_us[device]
        free[device] -= pages[device]
        counts[device][j] += 1
        if counts[device][j] < most[device] and pages[device] <= free[device]:
            heapreplace(places, (max(floor_us[device], busy_us[device] + lane_us[device]), device))
        else:
            heappop(places)
    return True
