"""Running sequences, where their lanes are, and the load and free pages that follow: what rebalancing works on."""

from collections import defaultdict
from collections.abc import Sequence
from math import inf

import msgspec

from hetis.core.placement import FleetView, Move, PoolId, pages_for
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.balance import insert
from hetis.dispatcher.bound import is_possible, least_possible_us
from hetis.dispatcher.load import FleetLoad, StageDevices, stage_devices, weak_workers
from hetis.dispatcher.problem import UNLIMITED, Problem
from hetis.dispatcher.room import reserve


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """A running sequence."""

    slot: int
    arrival: int
    num_tokens: int
    owners: tuple[tuple[int, ...], ...]  # [stage][G] ranks
    movable: bool = True  # not while its prompt is computed, nor while lanes of it are on the move


class Residents:
    """Residents, load and free pages in one call, as they will be after the moves found so far.

    Pages that a lane leaves behind are not given to others: they come free only when it has arrived.
    """

    def __init__(self, cost: CostModel, residents: Sequence[Resident], view: FleetView) -> None:
        self._cost, self._view = cost, view
        self.page_size = view.page_size
        self.stages = stage_devices(view.plan)
        self.load = FleetLoad(view.plan, cost)
        self.moved: set[tuple[int, int]] = set()  # (slot, stage)
        self._residents = {resident.slot: resident for resident in residents}
        self._owners = {resident.slot: [list(owners) for owners in resident.owners] for resident in residents}
        self._home_ranks = view.plan.home_ranks
        self._free = dict(view.free_pages)
        self._ranks = [{pool.rank for pool in stage.pools} for stage in self.stages]
        self._kv_bytes = {resident.slot: cost.kv_bytes(resident.num_tokens) for resident in residents}  # of one lane
        for stage in self.stages:
            self._load_stage(stage)

    def _load_stage(self, stage: StageDevices) -> None:
        """Counts the lanes of each pool first: one by one they took most of the time of a look at the balance."""
        num_lanes: defaultdict[int, int] = defaultdict(int)
        kv_bytes: defaultdict[int, float] = defaultdict(float)
        for slot, owners in self._owners.items():
            lane_bytes = self._kv_bytes[slot]
            for rank in owners[stage.stage]:
                num_lanes[rank] += 1
                kv_bytes[rank] += lane_bytes
        for pool in stage.pools:
            if num_lanes[pool.rank]:
                self.load.add(pool, num_lanes[pool.rank], kv_bytes[pool.rank] / num_lanes[pool.rank])

    @property
    def num_residents(self) -> int:
        return len(self._residents)

    def keep(self, num_tokens: int) -> None:
        """From now on homes keep pages for a prompt of so many tokens."""
        for stage in self.stages:
            for home in range(stage.num_homes):
                self._free[stage.pools[home]] -= reserve(stage, home, self._view, num_tokens)

    def by_arrival(self) -> list[Resident]:
        return sorted(self._residents.values(), key=lambda resident: resident.arrival)

    def holders(self, pool: PoolId) -> list[Resident]:
        return [r for slot, r in self._residents.items() if pool.rank in self._owners[slot][pool.stage]]

    def ends_for(self, pool: PoolId, num_pages: int) -> int:
        """Sequences that would have to end for so many pages to come free, as they are on average."""
        held = [
            len(self.groups(resident, pool)) * pages_for(resident.num_tokens, self.page_size)
            for resident in self.holders(pool)
        ]
        return min(len(held), -(-num_pages * len(held) // max(1, sum(held))))

    def groups(self, resident: Resident, pool: PoolId) -> list[int]:
        return [group for group, rank in enumerate(self._owners[resident.slot][pool.stage]) if rank == pool.rank]

    def work_us(self, resident: Resident, pool: PoolId) -> float:
        """What a sequence's lanes add to a device's time."""
        num_lanes = self._owners[resident.slot][pool.stage].count(pool.rank)
        return num_lanes * self.load.lane_us(pool.rank, self._kv_bytes[resident.slot])

    def bytes_of(self, move: Move) -> float:
        layers = self._view.plan.stages[move.stage].num_layers
        return self._residents[move.slot].num_tokens * self._cost.kv_bytes_per_token * layers

    def ideal_us(self, stage: StageDevices, at_least_us: float = 0.0) -> float:
        """Lower bound on the makespan of a stage: lanes divisible, memory pooled; other stages' lanes stay.

        Infinite if it can be shown at once not to be below `at_least_us`: for callers that need no more than that.
        """
        if not self._residents:
            return 0.0
        problem = self._pooled(stage)
        if at_least_us and not is_possible(problem, at_least_us):
            return inf
        return least_possible_us(problem, self.load.peak_us(stage.pools))

    def _pooled(self, stage: StageDevices) -> Problem:
        """To place all residents of a stage anew, with all the memory there is."""
        empty = self.load.copy()
        empty.clear(stage)
        lane_bytes = list(self._kv_bytes.values())
        return Problem(
            num_lanes=stage.num_lanes,
            num_homes=stage.num_homes,
            start_us=[empty.start_us(pool) for pool in stage.pools],
            floor_us=[empty.rates(pool.rank).floor_us for pool in stage.pools],
            lane_us=[empty.lanes_us(pool.rank, lane_bytes) for pool in stage.pools],
            most_lanes=list(stage.most_lanes),
            home_pages=[0] * len(lane_bytes),
            worker_pages=[0] * len(lane_bytes),
            free_pages=[UNLIMITED] * len(stage.pools),
        )

    def place(
        self,
        stage: StageDevices,
        resident: Resident,
        groups: Sequence[int],
        source: PoolId,
        *,
        most_stay: int,
        limit_us: float,
        use_weak: bool,
    ) -> list[Move] | None:
        """Where these lanes of a sequence, now in `source`, had better be; the moves that lead there.

        None if they find no pages, or if a device that gets lanes would take longer than `limit_us`. `use_weak`:
        whether workers that bring next to nothing may get lanes.
        """
        pages, kv_bytes = pages_for(resident.num_tokens, self.page_size) + 1, self._kv_bytes[resident.slot]
        load = self.load.copy()
        if source.rank in self._ranks[source.stage]:
            load.add(source, -len(groups), kv_bytes)
        homes = [self._home_ranks[stage.stage][group] for group in groups]
        most = [homes.count(pool.rank) for pool in stage.pools[: stage.num_homes]]
        most += [len(groups)] * (len(stage.pools) - stage.num_homes)
        free = [max(0, self._free[pool]) for pool in stage.pools]
        for device, pool in enumerate(stage.pools):
            if pool == source:
                most[device] = min(most[device], most_stay)
                free[device] += most_stay * pages
        lane_us = [[load.lane_us(pool.rank, kv_bytes)] for pool in stage.pools]
        for device in weak_workers(stage, lane_us) if not use_weak else set():
            most[device] = 0 if stage.pools[device] != source else most[device]
        problem = Problem(
            num_lanes=len(groups),
            num_homes=stage.num_homes,
            start_us=[load.start_us(pool) for pool in stage.pools],
            floor_us=[load.rates(pool.rank).floor_us for pool in stage.pools],
            lane_us=lane_us,
            most_lanes=most,
            home_pages=[pages],
            worker_pages=[pages],
            free_pages=free,
        )
        counts = insert(problem, [0])
        if counts is None:
            return None
        targets = self._targets(stage, groups, [held[0] for held in counts], source)
        for pool in targets.values():
            load.add(pool, 1, kv_bytes)
        if any(load.time_us(pool) > limit_us for pool in targets.values() if pool != source):
            return None
        return [
            Move(slot=resident.slot, stage=stage.stage, group=group, source=source.rank, target=pool.rank)
            for group, pool in targets.items()
            if pool != source
        ]

    def _targets(
        self, stage: StageDevices, groups: Sequence[int], counts: list[int], source: PoolId
    ) -> dict[int, PoolId]:
        """A pool for each group: homes get their own, the source keeps the first of the others."""
        targets: dict[int, PoolId] = {}
        homes = self._home_ranks[stage.stage]
        devices = sorted(
            range(len(counts)), key=lambda device: (device >= stage.num_homes, stage.pools[device] != source)
        )
        for device in devices:
            fitting = [
                group
                for group in groups
                if group not in targets and (device >= stage.num_homes or homes[group] == stage.pools[device].rank)
            ]
            targets |= dict.fromkeys(fitting[: counts[device]], stage.pools[device])
        return targets

    def apply(self, move: Move) -> None:
        resident = self._residents[move.slot]
        source, target = PoolId(move.source, move.stage), PoolId(move.target, move.stage)
        kv_bytes = self._kv_bytes[resident.slot]
        if source.rank in self._ranks[source.stage]:
            self.load.add(source, -1, kv_bytes)
        self.load.add(target, 1, kv_bytes)
        self._free[target] -= pages_for(resident.num_tokens, self.page_size) + 1
        self._owners[move.slot][move.stage][move.group] = move.target
        self.moved.add((move.slot, move.stage))

    def lost(self, resident: Resident) -> list[tuple[StageDevices, PoolId]]:
        """Where a sequence has lanes on ranks that the plan does not name."""
        return [
            (stage, PoolId(rank, stage.stage))
            for stage in self.stages
            for rank in sorted(set(resident.owners[stage.stage]) - self._ranks[stage.stage])
        ]
