"""Which lanes of running sequences should move: because a device is too slow, its pages run out, or it goes away.

Each call looks at the fleet as it is now. Devices that are new in the plan get lanes like others; lanes on ranks that
the plan does not name any more move first. What moves is placed by the min-max problem, exactly, with its own load
taken out; its lanes on devices that are not relieved stay where they are and keep their pages.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple

from hetis.core.placement import FleetView, Move, PoolId, pages_for
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.load import StageDevices
from hetis.dispatcher.residents import Resident, Residents

THETA = 0.5  # lanes move when the slowest device exceeds the lower bound by this fraction
MATTERS = 0.05  # of a layer's time: what the ideal would save must be more than that
SETTLED = 0.5  # of theta: once begun, rebalancing goes on down to there
LEAST_GAIN = 0.1  # devices that get lanes must stay so far below the one that is relieved
ATTEMPTS = 4  # sequences that are tried, those first that load the slowest device most
ROUNDS = 16  # sequences that move in one call and stage
MOVE_WORTH = 0.5  # of what the sequences bring that run because of a move, that a longer step may cost


class Outcome(NamedTuple):
    moves: list[Move]
    preempt: list[int]  # slots of sequences that have to start over, since no device has room for their lanes


class Relieved(NamedTuple):
    moves: list[Move]
    exhausted: list[PoolId]  # where moving does not help: a sequence with pages there has to start over


class MigrationBudget:
    """So many bytes per second on average, and at most one burst at once. Its caller brings the time.

    A lane may be larger than what is left: then the budget falls below 0 and nothing moves until it has recovered. So
    long lanes move as well.
    """

    def __init__(self, bytes_per_second: float, burst_bytes: float) -> None:
        self._bytes_per_second, self._burst_bytes = bytes_per_second, burst_bytes
        self.left_bytes = burst_bytes

    def refill(self, elapsed_seconds: float) -> None:
        self.left_bytes = min(self._burst_bytes, self.left_bytes + elapsed_seconds * self._bytes_per_second)

    def spend(self, num_bytes: float) -> None:
        self.left_bytes -= num_bytes


class Rebalancer:
    """A function of what it is given, but for the stages in which it has begun and is not done."""

    def __init__(self, cost: CostModel, theta: float = THETA) -> None:
        self._cost, self._theta = cost, theta
        self._unsettled: set[int] = set()

    def compute(
        self, residents: Sequence[Resident], view: FleetView, budget: MigrationBudget, staging_tokens: int = 0
    ) -> Outcome:
        """Relieves the slowest device of each stage while it is more than theta above the ideal.

        The ideal is the least peak that lanes which can be cut would have with all memory pooled. Lanes on ranks that
        have left the plan move in any case; `preempt` names sequences for whose such lanes there is no room.
        `staging_tokens`: of a prompt for which homes keep pages, or lanes would come that have to leave again for it.
        """
        fleet = Residents(self._cost, residents, view)
        outcome = self._evacuate(fleet)
        fleet.keep(staging_tokens)
        for stage in fleet.stages:
            outcome.moves.extend(self._settle(fleet, stage, budget))
        return outcome

    def _evacuate(self, fleet: Residents) -> Outcome:
        """Lanes off ranks that the plan does not name, whatever that costs, earliest arrivals first."""
        outcome = Outcome([], [])
        for resident in fleet.by_arrival():
            found: list[Move] = []
            for stage, pool in fleet.lost(resident):
                groups = fleet.groups(resident, pool)
                moves = fleet.place(stage, resident, groups, pool, most_stay=0, limit_us=inf, use_weak=True)
                if moves is None or not resident.movable:
                    outcome.preempt.append(resident.slot)
                    found = []  # what it took stays counted, in this call: no more is given out than there is
                    break
                for move in moves:
                    fleet.apply(move)
                found += moves
            outcome.moves.extend(found)
        return outcome

    def _settle(self, fleet: Residents, stage: StageDevices, budget: MigrationBudget) -> list[Move]:
        moves: list[Move] = []
        dense_us, peak_us = fleet.load.dense_us(stage), fleet.load.peak_us(stage.pools)
        bound = self._theta * (SETTLED if stage.stage in self._unsettled else 1.0)
        ideal_us = fleet.ideal_us(stage, min(peak_us / (1 + bound), (peak_us - MATTERS * dense_us) / (1 + MATTERS)))
        for _ in range(ROUNDS):
            slowest = max(stage.pools, key=fleet.load.time_us)
            if not self._is_far(stage, fleet.load.time_us(slowest), ideal_us, dense_us) or budget.left_bytes <= 0:
                break
            found = self._relieve(fleet, stage, slowest)
            if not found:
                self._unsettled.discard(stage.stage)
                break
            for move in found:
                if budget.left_bytes > 0:
                    budget.spend(fleet.bytes_of(move))
                    fleet.apply(move)
                    moves.append(move)
        return moves

    def _is_far(self, stage: StageDevices, peak_us: float, ideal_us: float, dense_us: float) -> bool:
        """Whether the peak is too far above the ideal; once it was, until it is near. Nothing is far from 0 or inf."""
        bound = self._theta * (SETTLED if stage.stage in self._unsettled else 1.0)
        is_far = 0.0 < (1 + bound) * ideal_us < peak_us and peak_us - ideal_us > MATTERS * (ideal_us + dense_us)
        (self._unsettled.add if is_far else self._unsettled.discard)(stage.stage)
        return is_far

    def _relieve(self, fleet: Residents, stage: StageDevices, slowest: PoolId) -> list[Move]:
        """Moves of one sequence with much work on the slowest device; none if no device can take its lanes."""
        limit_us = fleet.load.time_us(slowest) * (1 - LEAST_GAIN)
        holders = [r for r in fleet.holders(slowest) if r.movable and (r.slot, stage.stage) not in fleet.moved]
        holders.sort(key=lambda r: (-fleet.work_us(r, slowest), -r.arrival))
        for resident in holders[:ATTEMPTS]:
            groups = fleet.groups(resident, slowest)
            moves = fleet.place(
                stage, resident, groups, slowest, most_stay=len(groups), limit_us=limit_us, use_weak=False
            )
            if moves:
                return moves
        return []

    def memory(self, residents: Sequence[Resident], view: FleetView, missing: Mapping[PoolId, int]) -> Relieved:
        """Makes room for `missing` pages: lanes of the latest arrivals that have lanes there go elsewhere.

        Only as many lanes as are needed, and only if the sequences that would have to end otherwise are worth the
        longer step.
        """
        fleet = Residents(self._cost, residents, view)
        relieved = Relieved([], [])
        for pool in sorted(missing):
            moves = self._make_room(fleet, pool, missing[pool])
            if moves is None:
                relieved.exhausted.append(pool)
            else:
                relieved.moves.extend(moves)
        return relieved

    def _make_room(self, fleet: Residents, pool: PoolId, lacking: int) -> list[Move] | None:
        stage = fleet.stages[pool.stage]
        peak_us = fleet.load.peak_us(stage.pools)
        fewer = fleet.ends_for(pool, lacking)
        step_us = peak_us + fleet.load.dense_us(stage)
        limit_us = peak_us + MOVE_WORTH * step_us * fewer / (fleet.num_residents + 1 - fewer)
        moves: list[Move] = []
        for resident in sorted(fleet.holders(pool), key=lambda resident: -resident.arrival):
            if lacking <= 0:
                break
            if not resident.movable:
                continue
            pages = pages_for(resident.num_tokens, fleet.page_size)
            groups = fleet.groups(resident, pool)[: pages_for(lacking, pages)]
            for move in self._elsewhere(fleet, stage, resident, groups, pool, limit_us):
                fleet.apply(move)
                moves.append(move)
                lacking -= pages
        return moves if lacking <= 0 else None

    @staticmethod
    def _elsewhere(
        fleet: Residents, stage: StageDevices, resident: Resident, groups: Sequence[int], pool: PoolId, limit_us: float
    ) -> list[Move]:
        """On weak workers only if no other device has pages: rather there than starting over."""
        for use_weak in (False, True):
            moves = fleet.place(stage, resident, groups, pool, most_stay=0, limit_us=limit_us, use_weak=use_weak)
            if moves:
                return moves
        return []
