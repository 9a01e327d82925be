"""Exchanging lanes between devices until the slowest one cannot be relieved any more (`problem.py`).

A lane of the slowest device goes elsewhere; where it does not fit, other lanes make room and go on to a third device,
and so on: a chain of moves that ends with every device it touched below the old maximum. Direct moves, swaps, one for
several and rings over several devices are all such chains. Depth, width and the number of places tried are bounded, by
counts and not by a clock, so that the result is the same wherever it is computed.
"""

from math import ceil
from operator import mul

from hetis.dispatcher.problem import Counts, Problem, added

STEP = 2e-3  # what counts as an improvement
DEPTH = 4  # moves of a chain after the first
WIDTH = 12  # ways to make room that are tried at each move, those first that drive away least
LOOKS, LOOKS_PER_CHAIN = 8000, 2500  # devices, or sequences on devices, looked at: about half a microsecond each


class Exchange:
    """A placement that changes lane by lane."""

    def __init__(self, problem: Problem, counts: Counts) -> None:
        self._problem = problem
        self._pages = [problem.pages(device) for device in range(problem.num_devices)]
        self._held = [{j: count for j, count in enumerate(held) if count} for held in counts]  # by device
        self._busy_us = [
            start + added(map(mul, held, lane_us))
            for start, held, lane_us in zip(problem.start_us, counts, problem.lane_us, strict=True)
        ]
        self._free = [
            free - sum(map(mul, held, pages))
            for free, held, pages in zip(problem.free_pages, counts, self._pages, strict=True)
        ]
        self._weight = [added(costs) for costs in zip(*problem.lane_us, strict=True)]  # to compare unlike lanes by
        self._looks = 0

    def counts(self) -> Counts:
        """[N][J]"""
        return [[held.get(j, 0) for j in range(self._problem.num_sequences)] for held in self._held]

    def descend(self) -> None:
        """Relieves the slowest device again and again."""
        looks = LOOKS
        while looks > 0:
            slowest = max(range(len(self._held)), key=self._time_us)
            limit_us = self._time_us(slowest) * (1 - STEP)
            relieved = False
            for j in sorted(self._held[slowest], key=lambda j: (self._weight[j], j)):
                self._put(j, slowest, -1)
                if self._time_us(slowest) <= limit_us:
                    self._looks = allowed = min(looks, LOOKS_PER_CHAIN)
                    relieved = self._place(j, 1, slowest, limit_us, DEPTH)
                    looks -= allowed - self._looks
                if relieved:
                    break
                self._put(j, slowest, 1)
            if not relieved:
                return

    def _time_us(self, device: int) -> float:
        return max(self._problem.floor_us[device], self._busy_us[device]) if self._held[device] else 0.0

    def _put(self, j: int, device: int, count: int) -> None:
        held = self._held[device]
        now = held.get(j, 0) + count
        if now:
            held[j] = now
        else:
            del held[j]
        self._busy_us[device] += count * self._problem.lane_us[device][j]
        self._free[device] -= count * self._pages[device][j]

    def _place(self, j: int, count: int, origin: int, limit_us: float, depth: int) -> bool:
        """Finds places for lanes of `j` off `origin` with no device above `limit_us`. If not, nothing is changed."""
        problem = self._problem
        self._looks -= len(self._held)
        placed: list[tuple[int, int]] = []
        for device, lane_us in enumerate(problem.lane_us):
            if self._busy_us[device] + lane_us[j] <= limit_us and device != origin:
                fitting = min(count, self._room(j, device, limit_us))
                if fitting > 0:
                    self._put(j, device, fitting)
                    placed.append((device, fitting))
                    count -= fitting
                    if not count:
                        return True
        if depth and self._looks > 0:
            for device, other, driven in self._ways(j, count, origin, limit_us):
                self._put(other, device, -driven)
                self._put(j, device, count)
                if self._place(other, driven, device, limit_us, depth - 1):
                    return True
                self._put(j, device, -count)
                self._put(other, device, driven)
                if self._looks <= 0:
                    break
        for device, fitting in placed:
            self._put(j, device, -fitting)
        return False

    def _room(self, j: int, device: int, limit_us: float) -> int:
        """Lanes of `j` that a device with time for one can take as it is."""
        problem, pages = self._problem, self._pages[device][j]
        if problem.floor_us[device] > limit_us:
            return 0
        fitting = int((limit_us - self._busy_us[device]) / problem.lane_us[device][j])
        fitting = min(fitting, problem.most_lanes[device] - self._held[device].get(j, 0))
        return min(fitting, self._free[device] // pages) if pages else fitting

    def _ways(self, j: int, count: int, origin: int, limit_us: float) -> list[tuple[int, int, int]]:
        """(device, other sequence, its lanes to drive away) after which `count` lanes of `j` fit there."""
        problem, weights = self._problem, self._weight
        ways: list[tuple[float, int, int, int]] = []
        for device, held in enumerate(self._held):
            lane_us, pages = problem.lane_us[device], self._pages[device]
            over_us = self._busy_us[device] + count * lane_us[j] - limit_us
            lacking = count * pages[j] - self._free[device]
            if not held or device == origin or problem.floor_us[device] > limit_us:
                continue
            if held.get(j, 0) + count > problem.most_lanes[device]:
                continue
            self._looks -= len(held)
            for other, present in held.items():
                driven = ceil(over_us / lane_us[other]) if over_us > 0 else 1
                if lacking > 0:
                    driven = max(driven, -(-lacking // pages[other])) if pages[other] else present + 1
                if driven <= present and other != j:
                    ways.append((driven * weights[other], device, other, driven))
        ways.sort()
        return [way[1:] for way in ways[:WIDTH]]
