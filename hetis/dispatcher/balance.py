"""Solves the min-max problem of `problem.py`.

One sequence is solved exactly. Several are NP-hard (two like devices: partition): `balance` inserts them one by one, or
fits them under a limit (`first_fit.py`), and exchanges lanes (`exchange.py`), until a lower bound (`bound.py`) shows
that it is within 2 % of the optimum.
"""

from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace
from operator import mul

from hetis.dispatcher import native
from hetis.dispatcher.bound import is_possible_ref
from hetis.dispatcher.exchange import Exchange
from hetis.dispatcher.first_fit import first_fit
from hetis.dispatcher.problem import Counts, Problem, added, longest_first, peak_us

TOLERANCE = 0.02  # a solution known to be this near the optimum is good enough
FITS = 8  # limits that first fit tries


def balance(problem: Problem) -> Counts | None:
    """Lanes per device and sequence with the least `peak_us`; None when no placement was found that fits.

    Exact for one sequence; for several see docs/dispatch.md. Then as many lanes as the peak allows go home.
    """
    library = native.load() if problem.num_sequences else None
    return (balance_ref if library is None else library.balance)(problem)


def balance_ref(problem: Problem) -> Counts | None:
    """What `balance` computes, in Python; csrc/dispatcher follows it operation by operation."""
    order = longest_first(problem)
    inserted = insert(problem, order)
    if problem.num_sequences <= 1:
        return None if inserted is None else homeward(problem, inserted)
    if inserted is not None and _is_good(problem, order, peak_us(problem, inserted)):
        return homeward(problem, inserted)
    starts = [counts for counts in (_fit(problem, order, inserted), inserted) if counts is not None]
    if not starts:
        return None
    best = min(starts, key=lambda counts: peak_us(problem, counts))
    if not _is_good(problem, order, peak_us(problem, best)):
        exchange = Exchange(problem, best)
        exchange.descend()
        best = exchange.counts()
    return homeward(problem, best)


def insert(problem: Problem, order: Iterable[int]) -> Counts | None:
    """One sequence after the other, each as well as can be, given those before it. None where one does not fit.

    Lane by lane to the device that is then least loaded. For one sequence that is exact: the time of device i with n
    lanes rises with n, so T is the G-th smallest among the times of all (i, n), and the lanes taken are the G smallest.
    """
    busy_us, free = list(problem.start_us), list(problem.free_pages)
    floor_us, most = problem.floor_us, problem.most_lanes
    counts: Counts = [[0] * problem.num_sequences for _ in busy_us]
    pages = [problem.pages(device) for device in range(problem.num_devices)]
    for j in order:
        places = [
            (max(floor_us[device], busy_us[device] + lane_us[j]), device)
            for device, lane_us in enumerate(problem.lane_us)
            if most[device] and pages[device][j] <= free[device]
        ]
        heapify(places)
        for _ in range(problem.num_lanes):
            if not places:
                return None
            device = places[0][1]
            lane_us, pages_here = problem.lane_us[device][j], pages[device][j]
            busy_us[device] += lane_us
            free[device] -= pages_here
            held = counts[device]
            held[j] += 1
            if held[j] < most[device] and pages_here <= free[device]:
                heapreplace(places, (max(floor_us[device], busy_us[device] + lane_us), device))
            else:
                heappop(places)
    return counts


def _fit(problem: Problem, order: list[int], inserted: Counts | None) -> Counts | None:
    """First fit with the least limit for which it finds a way, by bisection around the peak of `inserted`."""
    if inserted is None:  # then any placement is welcome
        all_us = problem.num_lanes * added(map(max, zip(*problem.lane_us, strict=True)))
        return first_fit(problem, order, max(*problem.start_us, *problem.floor_us) + all_us)
    best, limit_us = None, peak_us(problem, inserted)
    lowest_us, next_us, highest_us = limit_us * 0.5, limit_us * 0.98, limit_us * 1.05
    for _ in range(FITS):
        found = first_fit(problem, order, next_us)
        if found is None:
            lowest_us = next_us
        else:
            best, highest_us = found, peak_us(problem, found)
            if _is_good(problem, order, highest_us):
                break
        next_us = (lowest_us + highest_us) / 2
    return best


def _is_good(problem: Problem, order: list[int], reached_us: float) -> bool:
    return not is_possible_ref(problem, order, reached_us / (1 + TOLERANCE))


def homeward(problem: Problem, counts: Counts) -> Counts:
    """Takes lanes from workers home wherever that keeps the peak."""
    limit_us = peak_us(problem, counts)
    for home in range(problem.num_homes):
        held, lane_us, most = counts[home], problem.lane_us[home], problem.most_lanes[home]
        budget_us = limit_us - problem.start_us[home] - added(map(mul, held, lane_us))
        if problem.floor_us[home] > limit_us or budget_us < min(lane_us, default=0.0):
            continue
        free = problem.free_pages[home] - sum(map(mul, held, problem.home_pages))
        for j, pages in enumerate(problem.home_pages):
            for worker in counts[problem.num_homes :]:
                while worker[j] and held[j] < most and lane_us[j] <= budget_us and pages <= free:
                    worker[j] -= 1
                    held[j] += 1
                    budget_us -= lane_us[j]
                    free -= pages
    return counts
