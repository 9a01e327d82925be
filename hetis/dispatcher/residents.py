"""The state that rebalancing uses: running sequences, the devices of their lanes, and the load and free pages."""

from collections import abc, defaultdict

import msgspec

from hetis.core.placement import FleetView, Move, PoolId, pages_for
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.insertion import insert
from hetis.dispatcher.load import FleetLoad, StageDevices, stage_devices, weak_workers
from hetis.dispatcher.problem import UNLIMITED, Problem
from hetis.dispatcher.room import reserve


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """A running sequence."""

    slot: int
    arrival: int
    num_tokens: int
    owners: tuple[tuple[int, ...], ...]  # [stage][G] ranks
    movable: bool = True  # not while its prompt is computed, nor while lanes of it migrate


class Residents:
    """Residents, load and free pages in one call, as they will be after the moves found so far.

    Pages that a lane leaves behind are not given to others: they come free only when its migration is committed.
    """

    def __init__(self, cost: CostModel, residents: abc.Sequence[Resident], view: FleetView) -> None:
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
        """Makes homes keep pages for a prompt of so many tokens from now on."""
        for stage in self.stages:
            for home in range(stage.num_homes):
                self._free[stage.pools[home]] -= reserve(stage, home, self._view, num_tokens)

    def by_arrival(self) -> list[Resident]:
        return sorted(self._residents.values(), key=lambda resident: resident.arrival)

    def holders(self, pool: PoolId) -> list[Resident]:
        """Residents with lanes in a pool."""
        return [r for slot, r in self._residents.items() if pool.rank in self._owners[slot][pool.stage]]

    def num_preempted_for(self, pool: PoolId, num_pages: int) -> int:
        """Sequences that would have to be preempted for so many pages of a pool, as many as they hold on average."""
        held = [
            len(self.groups(resident, pool)) * pages_for(resident.num_tokens, self.page_size)
            for resident in self.holders(pool)
        ]
        return min(len(held), -(-num_pages * len(held) // max(1, sum(held))))

    def groups(self, resident: Resident, pool: PoolId) -> list[int]:
        """Head groups whose lanes are in a pool."""
        return [group for group, rank in enumerate(self._owners[resident.slot][pool.stage]) if rank == pool.rank]

    def work_us(self, resident: Resident, pool: PoolId) -> float:
        """Time that a sequence's lanes add to a device."""
        num_lanes = self._owners[resident.slot][pool.stage].count(pool.rank)
        return num_lanes * self.load.lane_us(pool.rank, self._kv_bytes[resident.slot])

    def bytes_of(self, move: Move) -> float:
        """KV bytes of the lane, in all layers of its stage."""
        layers = self._view.plan.stages[move.stage].num_layers
        return self._residents[move.slot].num_tokens * self._cost.kv_bytes_per_token * layers

    def pooled(self, stage: StageDevices) -> Problem:
        """The problem of placing all residents of a stage anew with memory ignored; other stages' lanes stay."""
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
        resident: Resident,
        groups: abc.Sequence[int],
        source: PoolId,
        *,
        may_stay: bool,
        limit_us: float,
        use_weak: bool,
    ) -> list[Move] | None:
        """Moves of lanes of a sequence, now in `source`, to the devices where they raise the makespan least.

        None if there are not enough pages, or if a device that gets lanes would take longer than `limit_us`.
        `may_stay`: lanes may remain in `source`. `use_weak`: weak workers (`load.weak_workers`) may get lanes.
        """
        stage, kv_bytes = self.stages[source.stage], self._kv_bytes[resident.slot]
        load = self.load.copy()
        if source.rank in self._ranks[source.stage]:
            load.add(source, -len(groups), kv_bytes)
        counts = insert(self._problem(resident, groups, source, load, may_stay=may_stay, use_weak=use_weak), [0])
        if counts is None:
            return None
        targets = self._targets(stage, groups, [held[0] for held in counts], source)
        for pool in targets.values():
            load.add(pool, 1, kv_bytes)
        if any(load.time_us(pool) > limit_us for pool in targets.values() if pool != source):
            return None
        return [
            Move(slot=resident.slot, stage=source.stage, group=group, source=source.rank, target=pool.rank)
            for group, pool in targets.items()
            if pool != source
        ]

    def _problem(
        self,
        resident: Resident,
        groups: abc.Sequence[int],
        source: PoolId,
        load: FleetLoad,
        *,
        may_stay: bool,
        use_weak: bool,
    ) -> Problem:
        """The problem of placing these lanes. `load`: without them."""
        stage, pages = self.stages[source.stage], self._pages(resident)
        lane_us = [[load.lane_us(pool.rank, self._kv_bytes[resident.slot])] for pool in stage.pools]
        weak = set() if use_weak else weak_workers(stage, lane_us)
        homes = [self._home_ranks[stage.stage][group] for group in groups]
        most = [homes.count(pool.rank) for pool in stage.pools[: stage.num_homes]]
        most += [len(groups)] * (len(stage.pools) - stage.num_homes)
        free = [max(0, self._free[pool]) for pool in stage.pools]
        for device, pool in enumerate(stage.pools):
            if pool == source and may_stay:
                free[device] += len(groups) * pages
            elif pool == source or device in weak:
                most[device] = 0
        return Problem(
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

    def _targets(
        self, stage: StageDevices, groups: abc.Sequence[int], counts: list[int], source: PoolId
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

    def _pages(self, resident: Resident) -> int:
        """Pages that a lane takes where it goes, with one to grow."""
        return pages_for(resident.num_tokens, self.page_size) + 1

    def apply(self, move: Move) -> None:
        """Counts a move as done, except that the pages it frees stay taken."""
        resident = self._residents[move.slot]
        source, target = PoolId(move.source, move.stage), PoolId(move.target, move.stage)
        kv_bytes = self._kv_bytes[resident.slot]
        if source.rank in self._ranks[source.stage]:
            self.load.add(source, -1, kv_bytes)
        self.load.add(target, 1, kv_bytes)
        self._free[target] -= self._pages(resident)
        self._owners[move.slot][move.stage][move.group] = move.target
        self.moved.add((move.slot, move.stage))

    def lost(self, resident: Resident) -> list[PoolId]:
        """Pools of ranks that left the plan and in which a sequence has lanes."""
        return [
            PoolId(rank, stage.stage)
            for stage in self.stages
            for rank in sorted(set(resident.owners[stage.stage]) - self._ranks[stage.stage])
        ]
