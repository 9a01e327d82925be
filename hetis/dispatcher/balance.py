"""The min-max problem: on which devices do the lanes of new sequences live, so that the slowest device is fastest?

J sequences, N devices, G lanes per sequence. One pipeline stage is decided at a time. The first devices are the homes of
the head groups, the others are attention workers. With x_ji lanes of sequence j on device i, and y_i = 1 if any:

    minimise    T
    subject to  sum_i x_ji = G                                                   every lane lives somewhere    for all j
                max(floor_i, start_i + sum_j lane_us_ji x_ji) <= T  if y_i = 1   no used device takes longer   for all i
                sum_j pages_ji x_ji <= free_i                                    the lanes fit                 for all i
                0 <= x_ji <= most_i, integer                                     a home takes its own lanes only

Lanes of one sequence are alike, so this says everything: a home h with G_h groups has most_h = G_h, a worker has most_i
= G, and any such x can be turned into owners of head groups. The floor and the constants in `start_us` of a device that
is idle count only if it is used; a busy device that gets nothing has no part in T (it could not be helped anyway).

One sequence is solved exactly. Several are NP-hard (two like devices: partition); `balance` inserts them one by one,
longest first, then exchanges lanes (`exchange.py`), and stops when a lower bound says that it is within 2 %.
"""

from heapq import heapify, heappop, heapreplace

import msgspec

from hetis.dispatcher.exchange import Exchange

Counts = list[list[int]]  # [J][N] lanes

TOLERANCE = 0.02  # a solution known to be this near the optimum is good enough
FITS = 7  # bisections of first fit
SHORT, SHORT_CHAIN = 1600, 400
LONG, LONG_CHAIN = 20000, 4000


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Times are microseconds for one layer. Homes come first among the devices, since ties go to the first device."""

    num_lanes: int  # G, of each sequence
    start_us: list[float]  # [N] of a device that is used: what it holds already, its constants, its link's latency
    floor_us: list[float]  # [N] least time of a device that is used
    lane_us: list[list[float]]  # [J][N] each lane more
    most_lanes: list[int]  # [N] of one sequence
    lane_pages: list[list[int]]  # [J][N]
    free_pages: list[int]  # [N]

    @property
    def num_sequences(self) -> int:
        return len(self.lane_us)

    @property
    def num_devices(self) -> int:
        return len(self.start_us)


def balance(problem: Problem) -> Counts | None:
    """Lanes per sequence and device, with the least possible `peak_us`; None when no placement was found that fits.

    Exact for one sequence. For several within 2 % of the optimum wherever that could be checked (docs/dispatch.md).
    Among equals as many lanes as possible are at home.
    """
    if problem.num_sequences <= 1:
        return insert(problem, list(range(problem.num_sequences)))
    order = longest_first(problem)
    best = insert(problem, order)
    if best is not None and not _is_good(problem, order, best):
        best = _improve(problem, order, best)
    if best is None:
        best = first_fit(problem, order, float("inf"))
        best = None if best is None else _improve(problem, order, best)
    return None if best is None else _homeward(problem, best)


def peak_us(problem: Problem, counts: Counts) -> float:
    """T: the time of the slowest device among those that get lanes."""
    return max(times_us(problem, counts), default=0.0)


def times_us(problem: Problem, counts: Counts) -> list[float]:
    """Time of each device; 0 for those that get no lanes."""
    times = [0.0] * problem.num_devices
    for device in range(problem.num_devices):
        added = [(row[device], cost[device]) for row, cost in zip(counts, problem.lane_us, strict=True) if row[device]]
        if added:
            total = problem.start_us[device] + sum(count * lane_us for count, lane_us in added)
            times[device] = max(problem.floor_us[device], total)
    return times


def longest_first(problem: Problem) -> list[int]:
    """Sequences in the order of what a lane costs, ties in the order they came."""
    return sorted(range(problem.num_sequences), key=lambda j: -sum(problem.lane_us[j]))


def insert(problem: Problem, order: list[int]) -> Counts | None:
    """One sequence after the other, each as well as can be, given those before it.

    Lane by lane to the device that is then least loaded. For one sequence that is exact: the time of device i with n
    lanes rises with n, so T is the G-th smallest among the times of all (i, n), and the lanes taken are the G smallest.
    """
    num_devices = problem.num_devices
    busy_us, free, floor_us = list(problem.start_us), list(problem.free_pages), problem.floor_us
    counts: Counts = [[0] * num_devices for _ in range(problem.num_sequences)]
    for j in order:
        lane_us, pages, row = problem.lane_us[j], problem.lane_pages[j], counts[j]
        places = [
            (busy + lane if busy + lane > floor else floor, device)
            for device, (busy, lane, floor, most, page, room) in enumerate(
                zip(busy_us, lane_us, floor_us, problem.most_lanes, pages, free, strict=True)
            )
            if most and page <= room
        ]
        heapify(places)
        for _ in range(problem.num_lanes):
            if not places:
                return None
            device = places[0][1]
            row[device] += 1
            busy_us[device] += lane_us[device]
            free[device] -= pages[device]
            if row[device] < problem.most_lanes[device] and pages[device] <= free[device]:
                time_us = max(floor_us[device], busy_us[device] + lane_us[device])
                heapreplace(places, (time_us, device))
            else:
                heappop(places)
    return counts


def first_fit(problem: Problem, order: list[int], limit_us: float) -> Counts | None:
    """All lanes with no device above `limit_us`, or None if this rule finds no way.

    Devices take what fits, longest lanes first, in the order of how well they do long lanes in comparison to short ones.
    """
    lane_us, lane_pages, num_devices = problem.lane_us, problem.lane_pages, problem.num_devices
    left = [problem.num_lanes] * problem.num_sequences
    counts: Counts = [[0] * num_devices for _ in left]
    for device in _by_scarcity(problem, order, limit_us):
        budget = limit_us - problem.start_us[device]
        if budget <= 0 or problem.floor_us[device] > limit_us:
            continue
        free, most = problem.free_pages[device], problem.most_lanes[device]
        for j in order:
            cost = lane_us[j][device]
            if cost > budget:
                continue
            count = min(left[j], most, int(min(budget / cost, left[j])))
            pages = lane_pages[j][device]
            if pages * count > free:
                count = max(0, free // pages)
            if count:
                counts[j][device] = count
                left[j] -= count
                budget -= count * cost
                free -= count * pages
        order = [j for j in order if left[j]]
        if not order:
            return counts
    return None


def _by_scarcity(problem: Problem, order: list[int], limit_us: float) -> list[int]:
    longest, shortest = order[0], order[-1]

    def advantage(device: int) -> float:
        budget, free = limit_us - problem.start_us[device], problem.free_pages[device]
        if budget <= 0 or free <= 0:
            return 0.0
        shares = [problem.lane_us[j][device] / budget + problem.lane_pages[j][device] / free for j in (longest, shortest)]
        return shares[0] / shares[1]

    return sorted(range(problem.num_devices), key=lambda i: (problem.most_lanes[i] >= problem.num_lanes, advantage(i)))


def _by_advantage(problem: Problem, order: list[int]) -> list[int]:
    longest, shortest = problem.lane_us[order[0]], problem.lane_us[order[-1]]
    return sorted(range(problem.num_devices), key=lambda i: (longest[i] / shortest[i], -shortest[i]))


def is_possible(problem: Problem, order: list[int], limit_us: float) -> bool:
    """Whether lanes that can be cut could be computed within `limit_us`: if not, nothing can.

    Memory and homes do not count here. Then short lanes belong on devices that do short lanes comparatively well, long
    ones on the others: in an optimum of this linear program the order of one is the order of the other.
    """
    lengths = reversed(order)
    j = next(lengths)
    left = float(problem.num_lanes)
    for device in reversed(_by_advantage(problem, order)):
        budget = limit_us - problem.start_us[device]
        if problem.floor_us[device] > limit_us:
            continue
        while budget > 0:
            cost = problem.lane_us[j][device]
            if left * cost > budget:
                left -= budget / cost
                break
            budget -= left * cost
            left = float(problem.num_lanes)
            following = next(lengths, None)
            if following is None:
                return True
            j = following
    return False


def _is_good(problem: Problem, order: list[int], counts: Counts) -> bool:
    return not is_possible(problem, order, peak_us(problem, counts) / (1 + TOLERANCE))


def _improve(problem: Problem, order: list[int], first: Counts) -> Counts:
    """Exchanges lanes, from `first` and from what first fit finds; then further from the better of both."""
    starts = [first]
    fitted = _fit(problem, order, peak_us(problem, first))
    if fitted is not None:
        starts.insert(0, fitted)
    best: Exchange | None = None
    for start in starts:
        exchange = Exchange(problem, start)
        exchange.descend(SHORT, SHORT_CHAIN)
        if best is None or exchange.peak_us() < best.peak_us():
            best = exchange
        if _is_good(problem, order, best.counts()):
            return best.counts()
    assert best is not None
    best.descend(LONG, LONG_CHAIN)
    return best.counts()


def _fit(problem: Problem, order: list[int], limit_us: float) -> Counts | None:
    """First fit with the least limit for which it finds a way, by bisection."""
    best, lowest_us, highest_us = None, limit_us * 0.5, limit_us * 1.05
    for _ in range(FITS):
        middle_us = (lowest_us + highest_us) / 2
        found = first_fit(problem, order, middle_us)
        if found is None:
            lowest_us = middle_us
        else:
            best, highest_us = found, peak_us(problem, found)
    return best


def _homeward(problem: Problem, counts: Counts) -> Counts:
    return counts
