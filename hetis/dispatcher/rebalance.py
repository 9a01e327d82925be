"""Rebalancing: which lanes move because a device is too slow, its pages run out, or its rank left the plan.

Each call looks at the fleet as it is now; devices that are new in the plan are ordinary candidates. What moves are
lanes of one sequence on one device: they are placed anew, exactly, with their own load taken out, while its lanes on
other devices stay where they are and keep their pages.
"""

from collections import abc
from math import inf
from typing import NamedTuple

from hetis.core.placement import FleetView, Move, PoolId, pages_for
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.load import StageDevices
from hetis.dispatcher.residents import Resident, Residents
from hetis.dispatcher.solver import Solver, choose_solver

THRESHOLD = 0.5  # of hysteresis: lanes move when the makespan exceeds its lower bound by this fraction
SETTLED = 0.5  # of the threshold: rebalancing that has begun goes on down to there
MATTERS = 0.05  # of a layer's time at the lower bound: what could be gained must be more
LEAST_GAIN = 0.1  # devices that get lanes must stay below the time of the relieved one by this fraction
ATTEMPTS = 4  # sequences that are tried, in descending order of their work on the slowest device
ROUNDS = 16  # sequences that move in one call and stage
MOVE_WORTH = 0.5  # fraction of what the sequences bring that go on because of a move, that a longer step may cost


class Outcome(NamedTuple):
    moves: list[Move]
    preempt: list[int]  # slots of sequences with lanes on ranks that left the plan, for which no device has pages


class Relieved(NamedTuple):
    moves: list[Move]
    exhausted: list[PoolId]  # pools for which no moves were found: a sequence there has to be preempted


class MigrationBudget:
    """A token bucket of bytes. Its caller brings the time.

    A lane may be larger than what is left: then the budget falls below 0 and nothing moves until it has recovered. So
    lanes longer than the bucket move as well.
    """

    def __init__(self, bytes_per_second: float, burst_bytes: float) -> None:
        self._bytes_per_second, self._burst_bytes = bytes_per_second, burst_bytes
        self.left_bytes = burst_bytes

    def refill(self, elapsed_seconds: float) -> None:
        self.left_bytes = min(self._burst_bytes, self.left_bytes + elapsed_seconds * self._bytes_per_second)

    def spend(self, num_bytes: float) -> None:
        self.left_bytes -= num_bytes


class Rebalancer:
    """A function of its arguments and the cost model, except for the stages that it has begun to rebalance."""

    def __init__(self, cost: CostModel, threshold: float = THRESHOLD, solver: Solver | None = None) -> None:
        """`threshold`: of hysteresis, a fraction of the lower bound. `solver`: None for that of this process."""
        self._cost, self._threshold, self._solver = cost, threshold, solver or choose_solver()
        self._begun: set[int] = set()  # stages

    # --- balance ------------------------------------------------------------------------------------------------------

    def compute(
        self, residents: abc.Sequence[Resident], view: FleetView, budget: MigrationBudget, staging_tokens: int = 0
    ) -> Outcome:
        """Relieves the slowest device of each stage while the makespan is too far above its lower bound.

        The bound is that of the fractional relaxation with memory pooled. Lanes on ranks that left the plan move in any
        case; `preempt` names sequences for whose such lanes there are no pages. `staging_tokens`: of a prompt for which
        homes keep pages, so that no lanes come that would have to leave again for it.
        """
        fleet = Residents(self._cost, residents, view)
        outcome = self._evacuate(fleet)
        fleet.keep(staging_tokens)
        for stage in fleet.stages:
            outcome.moves.extend(self._settle(fleet, stage, budget))
        return outcome

    @staticmethod
    def _evacuate(fleet: Residents) -> Outcome:
        """Moves all lanes off ranks that left the plan, whatever that costs, earliest arrivals first."""
        outcome = Outcome([], [])
        for resident in fleet.by_arrival():
            found: list[Move] = []
            for pool in fleet.lost(resident):
                groups = fleet.groups(resident, pool)
                moves = fleet.place(resident, groups, pool, may_stay=False, limit_us=inf, use_weak=True)
                if moves is None or not resident.movable:
                    outcome.preempt.append(resident.slot)
                    found = []  # pages that its other lanes took stay counted in this call, which is safe
                    break
                for move in moves:
                    fleet.apply(move)
                found += moves
            outcome.moves.extend(found)
        return outcome

    def _settle(self, fleet: Residents, stage: StageDevices, budget: MigrationBudget) -> list[Move]:
        moves: list[Move] = []
        bound_us = self._bound_us(fleet, stage)
        for _ in range(ROUNDS):
            if not self._is_far(fleet, stage, bound_us) or budget.left_bytes <= 0:
                break
            found = self._relieve(fleet, stage)
            if not found:
                self._begun.discard(stage.stage)
                break
            for move in found:
                if budget.left_bytes > 0:
                    budget.spend(fleet.bytes_of(move))
                    fleet.apply(move)
                    moves.append(move)
        return moves

    def _bound_us(self, fleet: Residents, stage: StageDevices) -> float:
        """Lower bound on the makespan of a stage; infinite if it is so high that nothing has to move."""
        if not fleet.num_residents:
            return inf
        enough_us = self._enough_us(fleet, stage)
        return self._solver.lower_bound_us(fleet.pooled(stage), fleet.load.makespan_us(stage.pools), enough_us)

    def _is_far(self, fleet: Residents, stage: StageDevices, bound_us: float) -> bool:
        """Whether the makespan is too far above the bound; with hysteresis: once it was, until it is near."""
        is_far = 0.0 < bound_us < self._enough_us(fleet, stage)
        (self._begun.add if is_far else self._begun.discard)(stage.stage)
        return is_far

    def _enough_us(self, fleet: Residents, stage: StageDevices) -> float:
        """The least lower bound that the makespan is not too far from.

        Too far: makespan > (1 + threshold) bound, and makespan - bound > MATTERS (bound + non-attention time).
        """
        makespan_us, dense_us = fleet.load.makespan_us(stage.pools), fleet.load.dense_us(stage)
        threshold = self._threshold * (SETTLED if stage.stage in self._begun else 1.0)
        return min(makespan_us / (1 + threshold), (makespan_us - MATTERS * dense_us) / (1 + MATTERS))

    @staticmethod
    def _relieve(fleet: Residents, stage: StageDevices) -> list[Move]:
        """Moves of one sequence with much work on the slowest device; none if no device can take its lanes.

        With every such move the sorted times of the devices fall, so moves cannot go in circles.
        """
        slowest = max(stage.pools, key=fleet.load.time_us)
        limit_us = fleet.load.time_us(slowest) * (1 - LEAST_GAIN)
        holders = [r for r in fleet.holders(slowest) if r.movable and (r.slot, stage.stage) not in fleet.moved]
        holders.sort(key=lambda r: (-fleet.work_us(r, slowest), -r.arrival))
        for resident in holders[:ATTEMPTS]:
            groups = fleet.groups(resident, slowest)
            moves = fleet.place(resident, groups, slowest, may_stay=True, limit_us=limit_us, use_weak=False)
            if moves:
                return moves
        return []

    # --- memory -------------------------------------------------------------------------------------------------------

    def memory(self, residents: abc.Sequence[Resident], view: FleetView, missing: abc.Mapping[PoolId, int]) -> Relieved:
        """Makes room for `missing` pages: moves lanes of the latest arrivals that have lanes in these pools.

        Only as many lanes as are needed, and only if the sequences that would have to be preempted otherwise are worth
        the longer step.
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

    def _make_room(self, fleet: Residents, pool: PoolId, num_missing: int) -> list[Move] | None:
        limit_us = _worthwhile_us(fleet, pool, num_missing)
        moves: list[Move] = []
        for resident in sorted(fleet.holders(pool), key=lambda resident: -resident.arrival):
            if num_missing <= 0:
                break
            if not resident.movable:
                continue
            pages = pages_for(resident.num_tokens, fleet.page_size)
            groups = fleet.groups(resident, pool)[: pages_for(num_missing, pages)]
            for move in self._elsewhere(fleet, resident, groups, pool, limit_us):
                fleet.apply(move)
                moves.append(move)
                num_missing -= pages
        return moves if num_missing <= 0 else None

    @staticmethod
    def _elsewhere(
        fleet: Residents, resident: Resident, groups: abc.Sequence[int], pool: PoolId, limit_us: float
    ) -> list[Move]:
        """Weak workers get lanes only if no other device has pages: that is better than preemption."""
        for use_weak in (False, True):
            moves = fleet.place(resident, groups, pool, may_stay=False, limit_us=limit_us, use_weak=use_weak)
            if moves:
                return moves
        return []


def _worthwhile_us(fleet: Residents, pool: PoolId, num_pages: int) -> float:
    """The makespan up to which moving is better than preempting the k sequences that hold so many pages.

    A step may become longer by the fraction MOVE_WORTH k / (R + 1 - k) of its time, with R residents.
    """
    stage = fleet.stages[pool.stage]
    makespan_us = fleet.load.makespan_us(stage.pools)
    preempted = fleet.num_preempted_for(pool, num_pages)
    step_us = makespan_us + fleet.load.dense_us(stage)
    return makespan_us + MOVE_WORTH * step_us * preempted / (fleet.num_residents + 1 - preempted)
