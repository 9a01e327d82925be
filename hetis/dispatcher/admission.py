"""Admission of new sequences: placement problems, one per pipeline stage, from the state of the fleet, and back."""

from collections import abc
from enum import Enum, auto
from typing import NamedTuple

from hetis.core.placement import FleetView, Placement
from hetis.core.request import Sequence
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.load import FleetLoad, StageDevices, is_worth, stage_devices, weak_workers
from hetis.dispatcher.problem import UNLIMITED, Counts, Problem
from hetis.dispatcher.room import Pages, Room, pages_of, reserve
from hetis.dispatcher.solver import Solver

HORIZON = 256  # steps over which sending a prompt's KV to a worker is spread
TOKENS_AHEAD = 64  # lanes are weighed as they will be after so many steps: on slow devices they grow faster in time


class Lane(NamedTuple):
    """One lane of a new sequence."""

    pages: Pages
    kv_bytes: float  # that attention reads in a layer
    sent_bytes: float  # of its prompt in a layer, if it goes to a worker; per step over the horizon


class Decision(NamedTuple):
    """Lanes per stage, device and sequence, and the time of one step of the slowest stage."""

    counts: list[Counts]
    cycle_us: float


class Memory(Enum):
    """Which pages new lanes may take; those of weak workers (`load.weak_workers`) only with the last one."""

    POOLED = auto()  # memory is ignored
    RESERVED = auto()  # all but those that homes keep for the next prompts
    ALL = auto()
    ALL_WITH_WEAK = auto()


class Admission:
    """One call of `HetisDispatcher.assign`: placements of the first n of the new sequences."""

    def __init__(self, cost: CostModel, solver: Solver, sequences: abc.Sequence[Sequence], view: FleetView) -> None:
        self._cost, self._solver, self._view = cost, solver, view
        self._stages = stage_devices(view.plan)
        self._layers = [stage.num_layers for stage in view.plan.stages]
        self._load = FleetLoad.of_view(view, cost, TOKENS_AHEAD)
        self._dense_us = [self._load.dense_us(stage) for stage in self._stages]
        self._lanes = [self._lane(sequence) for sequence in sequences]
        self._most_at_home = self._first_fitting()
        self._decided: dict[int, Decision] = {}
        self._reserved_tokens = max((len(sequence.token_ids) for sequence in sequences), default=0)

    @property
    def num_fitting(self) -> int:
        """Sequences, from the first on, for which there are pages."""
        return len(self._most_at_home)

    @property
    def num_running(self) -> int:
        """Sequences that are placed already."""
        first = self._stages[0]
        return sum(self._view.held_lanes[pool] for pool in first.pools) // first.num_lanes

    def decide(self, count: int) -> Decision:
        """The placement of the first `count` <= `num_fitting` sequences. It fits, whatever the solver finds."""
        if count not in self._decided:
            self._decided[count] = self._decide_with_reserve(count)
        return self._decided[count]

    def _decide_with_reserve(self, count: int) -> Decision:
        """Keeps pages of homes for the next prompt, unless a longer step costs more than one more sequence brings."""
        decision = self._decide(count, Memory.ALL) or self._decide(count, Memory.ALL_WITH_WEAK)
        assert decision is not None, "placements at home fit"
        if self._keeps_reserve(decision):
            return decision
        reserving = self._decide(count, Memory.RESERVED)
        if reserving is None or not is_worth(1, self.num_running + count, reserving.cycle_us, decision.cycle_us):
            return decision
        return reserving

    def pooled_cycle_us(self, count: int) -> float:
        """The time of a step of the slowest stage with memory ignored."""
        decision = self._decide(count, Memory.POOLED)
        assert decision is not None, "homes can take all lanes"
        return decision.cycle_us

    def placements(self, decision: Decision) -> list[Placement]:
        by_stage = [
            [stage.owners(row) for row in zip(*counts, strict=True)]
            for stage, counts in zip(self._stages, decision.counts, strict=True)
        ]
        return [Placement(owners=owners) for owners in zip(*by_stage, strict=True)]

    def _lane(self, sequence: Sequence) -> Lane:
        num_tokens = len(sequence.token_ids)
        return Lane(
            pages=pages_of(sequence, self._view.page_size),
            kv_bytes=self._cost.kv_bytes(num_tokens + TOKENS_AHEAD),
            sent_bytes=num_tokens * self._cost.kv_bytes_per_token / HORIZON,
        )

    def _first_fitting(self) -> list[list[list[int]]]:
        """[sequence][stage][N] lanes, at home if possible, of each sequence up to the first that does not fit."""
        room, found = Room(self._stages, self._view), []
        for lane in self._lanes:
            counts = room.most_at_home(lane.pages) if room.take_prompt(lane.pages) else None
            if counts is None:
                break
            room.take_lanes(counts, lane.pages)
            found.append(counts)
        return found

    # --- problems -----------------------------------------------------------------------------------------------------

    def _decide(self, count: int, memory: Memory) -> Decision | None:
        """Places the first `count` sequences stage by stage; None if a stage has no placement within such memory.

        Stages that share workers are solved once more, since the first ones did not know what workers do for the last.
        """
        load, lanes = self._load.copy(), self._lanes[:count]
        free = self._free_after_prompts(lanes)
        chosen: list[Counts] = []
        for index in self._order_of_stages():
            if index < len(chosen):
                self._add(load, index, chosen[index], -1)
            counts = self._place(index, lanes, load, free[index], memory)
            if counts is None:
                return None
            self._add(load, index, counts, 1)
            chosen[index : index + 1] = [counts]
        makespans_us = [self._makespan_us(load, stage, lanes, memory) for stage in self._stages]
        cycles = zip(self._layers, self._dense_us, makespans_us, strict=True)
        return Decision(chosen, max(layers * (dense_us + makespan_us) for layers, dense_us, makespan_us in cycles))

    def _order_of_stages(self) -> list[int]:
        share_workers = len(self._stages) > 1 and bool(self._view.plan.workers)
        return list(range(len(self._stages))) * (2 if share_workers else 1)

    def _free_after_prompts(self, lanes: list[Lane]) -> list[list[int]]:
        """[stage][N] pages left when homes hold the prompts of all these lanes."""
        room = Room(self._stages, self._view)
        for lane in lanes:
            room.take_prompt(lane.pages)
        return room.free

    def _place(self, index: int, lanes: list[Lane], load: FleetLoad, free: list[int], memory: Memory) -> Counts | None:
        """Lanes of one stage. With all memory a placement exists, if only the one at home."""
        stage = self._stages[index]
        if not lanes:
            return [[] for _ in stage.pools]
        counts = self._solver.solve(self._problem(stage, lanes, load, free, memory))
        if counts is None and memory is Memory.ALL_WITH_WEAK:
            at_home = [counts_of_sequence[index] for counts_of_sequence in self._most_at_home[: len(lanes)]]
            return [list(row) for row in zip(*at_home, strict=True)]
        if memory is Memory.RESERVED and counts is not None and not _grows_at_home(stage, free, counts, lanes):
            return None
        return counts

    def _problem(
        self, stage: StageDevices, lanes: list[Lane], load: FleetLoad, free: list[int], memory: Memory
    ) -> Problem:
        """A stage's problem; with a reserve, that after staging: lanes at home take all their pages, others none."""
        lane_us = self._lanes_us(stage, lanes, load)
        weak = weak_workers(stage, lane_us) if memory is not Memory.ALL_WITH_WEAK else set()
        return Problem(
            num_lanes=stage.num_lanes,
            num_homes=stage.num_homes,
            start_us=[load.start_us(pool) for pool in stage.pools],
            floor_us=[load.rates(pool.rank).floor_us for pool in stage.pools],
            lane_us=lane_us,
            most_lanes=[0 if device in weak else most for device, most in enumerate(stage.most_lanes)],
            home_pages=[lane.pages.later if memory is Memory.RESERVED else lane.pages.growth for lane in lanes],
            worker_pages=[lane.pages.later for lane in lanes],
            free_pages=self._free_pages(stage, free, memory),
        )

    def _free_pages(self, stage: StageDevices, free: list[int], memory: Memory) -> list[int]:
        """[N] pages that new lanes may take. `free`: what the prompts leave."""
        if memory is Memory.POOLED:
            return [UNLIMITED] * len(free)
        at_home = self._beyond_reserve(stage) if memory is Memory.RESERVED else free[: stage.num_homes]
        return [max(0, pages) for pages in (*at_home, *free[stage.num_homes :])]

    def _lanes_us(self, stage: StageDevices, lanes: list[Lane], load: FleetLoad) -> list[list[float]]:
        """[N][J] time that a lane of each sequence adds to each device; on workers its way there counts as well."""
        kv_bytes = [lane.kv_bytes for lane in lanes]
        times_us = [load.lanes_us(pool.rank, kv_bytes) for pool in stage.pools]
        for pool, row in zip(stage.pools[stage.num_homes :], times_us[stage.num_homes :], strict=True):
            us_per_byte = self._cost.prompt_us_per_byte(pool.rank)
            row[:] = [lane_us + us_per_byte * lane.sent_bytes for lane_us, lane in zip(row, lanes, strict=True)]
        return times_us

    def _makespan_us(self, load: FleetLoad, stage: StageDevices, lanes: list[Lane], memory: Memory) -> float:
        """The slowest device's time; with weak workers, theirs comes on top, since a step often waits for them."""
        if memory is not Memory.ALL_WITH_WEAK:
            return load.makespan_us(stage.pools)
        weak = {stage.pools[device] for device in weak_workers(stage, self._lanes_us(stage, lanes, load))}
        return load.makespan_us(set(stage.pools) - weak) + load.makespan_us(weak)

    def _add(self, load: FleetLoad, index: int, counts: Counts, sign: int) -> None:
        for pool, held in zip(self._stages[index].pools, counts, strict=True):
            for lane, count in zip(self._lanes, held, strict=False):
                if count:
                    load.add(pool, sign * count, lane.kv_bytes)

    # --- pages for the next prompts -----------------------------------------------------------------------------------

    def _beyond_reserve(self, stage: StageDevices) -> list[int]:
        """Free pages of each home less those that it keeps for the next prompts."""
        view = self._view
        kept = [reserve(stage, home, view, self._reserved_tokens) for home in range(stage.num_homes)]
        return [view.free_pages[pool] - pages for pool, pages in zip(stage.pools, kept, strict=False)]

    def _keeps_reserve(self, decision: Decision) -> bool:
        for stage, counts in zip(self._stages, decision.counts, strict=True):
            for left, held in zip(self._beyond_reserve(stage), counts, strict=False):
                taken = sum(count * lane.pages.later for count, lane in zip(held, self._lanes, strict=False))
                if taken > max(0, left):
                    return False
        return True


def _grows_at_home(stage: StageDevices, free: list[int], counts: Counts, lanes: list[Lane]) -> bool:
    """Whether the pages that homes have beside the prompts are enough for their lanes to grow."""
    return all(
        sum(count * lane.pages.growth for count, lane in zip(counts[home], lanes, strict=True)) <= free[home]
        for home in range(stage.num_homes)
    )
