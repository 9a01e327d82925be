"""The min-max problem: on which devices do the lanes of new sequences live, so that the slowest device is fastest?

J sequences, N devices, G lanes per sequence. One pipeline stage is decided at a time. The first devices are the homes of
the head groups, the others are attention workers. With x_ji lanes of sequence j on device i, and y_i = 1 if any:

    minimise    T
    subject to  sum_i x_ji = G                                                   every lane lives somewhere    for all j
                max(floor_i, start_i + sum_j lane_us_ji x_ji) <= T  if y_i = 1   no used device takes longer   for all i
                sum_j pages_ji x_ji <= free_pages_i                              the lanes fit                 for all i
                0 <= x_ji <= most_lanes_i, integer                               a home takes its own lanes only

Lanes of one sequence are alike, so this says everything: a home with G_h groups has most_lanes = G_h, a worker G, and any
such x can be turned into owners of head groups. The floor and the constants in `start_us` of a device that is idle count
only if it is used; a busy device that gets nothing has no part in T (it could not be helped anyway).

One sequence is solved exactly. Several are NP-hard (two like devices: partition): `balance` inserts them one by one, or
fits them under a limit, and exchanges lanes (`exchange.py`) until a lower bound says that it is within 2 %.
"""

from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace
from operator import mul

import msgspec

from hetis.dispatcher.exchange import Exchange

Counts = list[list[int]]  # [N][J] lanes

TOLERANCE = 0.02  # a solution known to be this near the optimum is good enough
FITS = 8  # limits that first fit tries


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


def balance(problem: Problem) -> Counts | None:
    """Lanes per device and sequence with the least `peak_us`; None when no placement was found that fits.

    Exact for one sequence; for several see docs/dispatch.md. Then as many lanes as the peak allows go home.
    """
    if problem.num_sequences <= 1:
        return insert(problem, range(problem.num_sequences))
    order = longest_first(problem)
    inserted = insert(problem, order)
    if inserted is not None and _is_good(problem, order, peak_us(problem, inserted)):
        return _homeward(problem, inserted)
    starts = [counts for counts in (_fit(problem, order, inserted), inserted) if counts is not None]
    if not starts:
        return None
    best = min(starts, key=lambda counts: peak_us(problem, counts))
    if not _is_good(problem, order, peak_us(problem, best)):
        exchange = Exchange(problem, best)
        exchange.descend()
        best = exchange.counts()
    return _homeward(problem, best)


def peak_us(problem: Problem, counts: Counts) -> float:
    """T: the time of the slowest device among those that get lanes."""
    return max(times_us(problem, counts), default=0.0)


def times_us(problem: Problem, counts: Counts) -> list[float]:
    """Time of each device; 0 for those that get no lanes."""
    return [
        max(floor, start + sum(map(mul, held, lane_us))) if any(held) else 0.0
        for held, lane_us, start, floor in zip(counts, problem.lane_us, problem.start_us, problem.floor_us, strict=True)
    ]


def longest_first(problem: Problem) -> list[int]:
    """Sequences in the order of what their lanes cost, ties in the order they came."""
    cost_us = [-sum(costs) for costs in zip(*problem.lane_us, strict=True)]
    return sorted(range(problem.num_sequences), key=cost_us.__getitem__)


def insert(problem: Problem, order: Iterable[int]) -> Counts | None:
    """One sequence after the other, each as well as can be, given those before it. None where one does not fit.

    Lane by lane to the device that is then least loaded. For one sequence that is exact: the time of device i with n
    lanes rises with n, so T is the G-th smallest among the times of all (i, n), and the lanes taken are the G smallest.
    """
    busy_us, free, floor_us, most = (
        list(problem.start_us),
        list(problem.free_pages),
        problem.floor_us,
        problem.most_lanes,
    )
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


# --- under a limit ----------------------------------------------------------------------------------------------------


def first_fit(problem: Problem, order: list[int], limit_us: float) -> Counts | None:
    """All lanes with no device above `limit_us`, or None if this rule finds no way.

    Devices take what fits, longest lanes first, in the order of how well they do long lanes in comparison to short ones.
    Homes that divide the lanes among them go before, each beginning with the lengths that would fall to it in that order.
    """
    left = [problem.num_lanes] * problem.num_sequences
    counts: Counts = [[0] * problem.num_sequences for _ in problem.start_us]
    for device, wishes in _wishes(problem, order, limit_us):
        budget_us, free, most = (
            limit_us - problem.start_us[device],
            problem.free_pages[device],
            problem.most_lanes[device],
        )
        lane_us, pages, held = problem.lane_us[device], problem.pages(device), counts[device]
        for j in wishes:
            cost_us = lane_us[j]
            if cost_us > budget_us or not left[j]:
                continue
            count = min(int(min(budget_us / cost_us, most)), left[j])
            if pages[j] * count > free:
                count = free // pages[j]
            held[j] = count
            left[j] -= count
            budget_us -= count * cost_us
            free -= count * pages[j]
    return None if any(left) else counts


def _wishes(problem: Problem, order: list[int], limit_us: float) -> list[tuple[int, list[int]]]:
    """The devices that can help, in the order in which they may choose, each with the sequences it likes best."""
    longest, middle, shortest = order[0], order[len(order) // 2], order[-1]
    rated: list[tuple[float, int, float]] = []  # price of a long lane in short ones, device, middle lanes that fit
    for device in _helpful(problem, limit_us):
        budget_us, free = limit_us - problem.start_us[device], max(problem.free_pages[device], 1e-9)
        lane_us, pages = problem.lane_us[device], problem.pages(device)
        shares = [lane_us[j] / budget_us + pages[j] / free for j in (longest, middle, shortest)]
        rated.append((shares[0] / shares[2], device, 1 / shares[1]))
    rated.sort()
    total = sum(fitting for _, _, fitting in rated)
    homes, others, passed = [], [], 0.0
    for _, device, fitting in rated:
        if problem.most_lanes[device] == problem.num_lanes:
            others.append((device, order))
        else:
            at = len(order) * passed / max(total - fitting, passed, 1e-300)
            homes.append((device, [j for _, j in sorted((abs(rank + 0.5 - at), j) for rank, j in enumerate(order))]))
        passed += fitting
    return homes + others


def _helpful(problem: Problem, limit_us: float) -> list[int]:
    return [
        device
        for device, (start, floor, most) in enumerate(
            zip(problem.start_us, problem.floor_us, problem.most_lanes, strict=True)
        )
        if start < limit_us and floor <= limit_us and most
    ]


def _fit(problem: Problem, order: list[int], inserted: Counts | None) -> Counts | None:
    """First fit with the least limit for which it finds a way, by bisection; the limit is near or below `inserted`'s."""
    if inserted is None:
        return first_fit(problem, order, float("inf"))
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


# --- a bound ----------------------------------------------------------------------------------------------------------


def is_possible(problem: Problem, order: list[int], limit_us: float) -> bool:
    """False: no placement keeps every device within `limit_us`, not even one of lanes that can be cut. True: unknown.

    Each device is given its scarcer resource alone, time or pages, of which a lane takes a share. Filling the devices
    that do long lanes comparatively badly with the shortest lanes, and so on, is then the best there is; the sequence
    that two neighbours divide sets their relative price. If at these prices all lanes, each where it is cheapest, cost
    more than all devices are worth, nothing can fit (weak duality), however the prices came about.
    """
    devices = [_shares(problem, device, limit_us) for device in _helpful(problem, limit_us)]
    if not devices:
        return False
    longest, shortest = order[0], order[-1]
    devices.sort(key=lambda shares: shares[shortest] / shares[longest])
    lengths = reversed(order)
    j, left, price, prices = next(lengths), float(problem.num_lanes), 1.0, [1.0]
    for shares, following in zip(devices, [*devices[1:], None], strict=True):
        room = 1.0
        while left * shares[j] <= room:
            room -= left * shares[j]
            longer = next(lengths, None)
            if longer is None:
                return True
            j, left = longer, float(problem.num_lanes)
        left -= room / shares[j]
        if following is not None:
            price *= shares[j] / following[j]
            prices.append(price)
    priced = [[price * share for share in shares] for price, shares in zip(prices, devices, strict=True)]
    cost = problem.num_lanes * sum(map(min, zip(*priced, strict=True)))
    return cost <= sum(prices) * (1 + 1e-9)


def _shares(problem: Problem, device: int, limit_us: float) -> list[float]:
    """[J] the share that one lane takes of a device's time or pages, whichever is scarcer for all lanes together."""
    budget_us, free, pages = limit_us - problem.start_us[device], problem.free_pages[device], problem.pages(device)
    if sum(pages) * budget_us > sum(problem.lane_us[device]) * free and all(pages):
        return [count / max(free, 0.5) for count in pages]
    return [cost_us / budget_us for cost_us in problem.lane_us[device]]


def _is_good(problem: Problem, order: list[int], reached_us: float) -> bool:
    return not is_possible(problem, order, reached_us / (1 + TOLERANCE))


def _homeward(problem: Problem, counts: Counts) -> Counts:
    """Takes lanes from workers home wherever that keeps the peak."""
    times = times_us(problem, counts)
    for home in range(problem.num_homes):
        held, lane_us, most = counts[home], problem.lane_us[home], problem.most_lanes[home]
        budget_us = max(times) - times[home]
        if not times[home] or budget_us < min(lane_us):
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
