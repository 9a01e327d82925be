"""Exchanging lanes between devices until the slowest one cannot be relieved any more (see `balance.py` for the problem).

A lane of the slowest device goes elsewhere; where it does not fit, other lanes make room and go on to a third device,
and so on: a chain of moves that ends with every device it touched below the old maximum. Direct moves, swaps, one for
several and rings over several devices are all such chains. Depth, width and the number of places tried are bounded, by
counts and not by a clock, so that the result is the same wherever it is computed.
"""

from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hetis.dispatcher.balance import Counts, Problem

STEP = 2e-3  # what counts as an improvement
DEPTH = 4  # moves of a chain after the first
WIDTH = 12  # ways to make room that are tried at each move, those first that drive away least
MOST_DRIVEN = 3  # lanes that may be driven away at once


class Exchange:
    """A placement that changes lane by lane."""

    def __init__(self, problem: "Problem", counts: "Counts") -> None:
        self._problem = problem
        self._held: list[dict[int, int]] = [
            {j: row[device] for j, row in enumerate(counts) if row[device]} for device in range(problem.num_devices)
        ]
        self._busy_us = [
            start + sum(count * problem.lane_us[j][device] for j, count in held.items())
            for device, (start, held) in enumerate(zip(problem.start_us, self._held, strict=True))
        ]
        self._free = [
            free - sum(count * problem.lane_pages[j][device] for j, count in held.items())
            for device, (free, held) in enumerate(zip(problem.free_pages, self._held, strict=True))
        ]
        self._weight = [sum(row) for row in problem.lane_us]  # what to compare unlike lanes by
        self._fastest_first = [sorted(range(problem.num_devices), key=row.__getitem__) for row in problem.lane_us]
        self._tries = 0

    def counts(self) -> "Counts":
        """[J][N]"""
        return [[held.get(j, 0) for held in self._held] for j in range(self._problem.num_sequences)]

    def peak_us(self) -> float:
        return max(map(self._time_us, range(self._problem.num_devices)))

    def descend(self, tries: int, tries_per_chain: int) -> None:
        """Relieves the slowest device again and again, looking at no more than `tries` places in all."""
        while tries > 0:
            slowest = max(range(self._problem.num_devices), key=self._time_us)
            limit_us = self._time_us(slowest) * (1 - STEP)
            relieved = False
            for j in sorted(self._held[slowest], key=self._weight.__getitem__):
                self._put(j, slowest, -1)
                if self._time_us(slowest) <= limit_us:
                    self._tries = min(tries, tries_per_chain)
                    before = self._tries
                    relieved = self._place(j, 1, slowest, limit_us, DEPTH)
                    tries -= before - self._tries
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
        self._busy_us[device] += count * self._problem.lane_us[j][device]
        self._free[device] -= count * self._problem.lane_pages[j][device]

    def _place(self, j: int, count: int, origin: int, limit_us: float, depth: int) -> bool:
        """Finds places for lanes of `j` off `origin` with no device above `limit_us`. If not, nothing is changed."""
        self._tries -= 1
        placed: list[tuple[int, int]] = []
        for device in self._fastest_first[j]:
            fitting = self._room(j, device, limit_us) if device != origin else 0
            if fitting > 0:
                fitting = min(fitting, count)
                self._put(j, device, fitting)
                placed.append((device, fitting))
                count -= fitting
                if not count:
                    return True
        if depth and self._tries > 0:
            for device, other, driven in self._ways(j, count, origin, limit_us):
                self._put(other, device, -driven)
                self._put(j, device, count)
                if self._place(other, driven, device, limit_us, depth - 1):
                    return True
                self._put(j, device, -count)
                self._put(other, device, driven)
                if self._tries <= 0:
                    break
        for device, fitting in placed:
            self._put(j, device, -fitting)
        return False

    def _room(self, j: int, device: int, limit_us: float) -> int:
        """Lanes of `j` that a device can take as it is."""
        problem = self._problem
        fitting = int((limit_us - self._busy_us[device]) / problem.lane_us[j][device])
        if fitting <= 0 or problem.floor_us[device] > limit_us:
            return 0
        fitting = min(fitting, problem.most_lanes[device] - self._held[device].get(j, 0))
        pages = problem.lane_pages[j][device]
        return min(fitting, self._free[device] // pages) if pages else fitting

    def _ways(self, j: int, count: int, origin: int, limit_us: float) -> list[tuple[int, int, int]]:
        """(device, other sequence, its lanes to drive away) after which `count` lanes of `j` fit there."""
        problem = self._problem
        ways: list[tuple[float, int, int, int]] = []
        weight = self._weight[j] * count
        for device, held in enumerate(self._held):
            if device == origin or not held or problem.floor_us[device] > limit_us:
                continue
            if held.get(j, 0) + count > problem.most_lanes[device]:
                continue
            over_us = self._busy_us[device] + count * problem.lane_us[j][device] - limit_us
            lacking = count * problem.lane_pages[j][device] - self._free[device]
            for other, present in held.items():
                driven = 1
                if over_us > 0:
                    driven = ceil(over_us / problem.lane_us[other][device])
                if lacking > 0:
                    pages = problem.lane_pages[other][device]
                    driven = max(driven, -(-lacking // pages)) if pages else MOST_DRIVEN + 1
                if driven <= MOST_DRIVEN and driven <= present and other != j:
                    ways.append((driven * self._weight[other] - weight, device, other, driven))
        ways.sort()
        return [way[1:] for way in ways[:WIDTH]]
