"""From new sequences and the state of the fleet to min-max problems, one per pipeline stage, and back to placements."""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import NamedTuple

from hetis.core.placement import FleetView, Placement
from hetis.core.request import Sequence as Request
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.load import FleetLoad, StageDevices, is_worth, stage_devices, weak_workers
from hetis.dispatcher.problem import UNLIMITED, Counts, Problem
from hetis.dispatcher.room import Pages, Room, pages_of, reserve

Solve = Callable[[Problem], Counts | None]

HORIZON = 256  # steps over which sending a prompt's KV to a worker is spread
TOKENS_AHEAD = 64  # lanes are weighed as they will be after so many steps: on slow devices they grow faster in time


class Lane(NamedTuple):
    """One lane of a new sequence."""

    pages: Pages
    kv_bytes: float  # that attention reads in a layer
    sent_bytes: float  # of its prompt, in a layer, if it goes to a worker; per step over the horizon


class Decision(NamedTuple):
    """Lanes per stage, device and sequence, and the time of one step of the slowest stage."""

    counts: list[Counts]
    cycle_us: float


class Memory(Enum):
    """How much of it lanes may take."""

    POOLED = auto()  # as if it were no matter
    CAREFUL = auto()  # homes keep some pages for the next prompts
    ALL = auto()
    ALL_EVERYWHERE = auto()  # weak devices' too


class Admission:
    """One call of `HetisDispatcher.assign`: what could be done with the first n of the new sequences."""

    def __init__(self, cost: CostModel, solve: Solve, sequences: Sequence[Request], view: FleetView) -> None:
        self._cost, self._solve, self._view = cost, solve, view
        self._stages = stage_devices(view.plan)
        self._layers = [stage.num_layers for stage in view.plan.stages]
        self._load = FleetLoad.of_view(view, cost, TOKENS_AHEAD)
        self._dense_us = [self._load.dense_us(stage) for stage in self._stages]
        self._lanes = [self._lane(sequence) for sequence in sequences]
        self._homeward = self._first_fitting()
        self._decided: dict[int, Decision] = {}
        self._reserved_tokens = max((len(sequence.token_ids) for sequence in sequences), default=0)

    @property
    def num_fitting(self) -> int:
        """Sequences, from the first on, for which there is room."""
        return len(self._homeward)

    @property
    def num_running(self) -> int:
        """Sequences that are placed already."""
        first = self._stages[0]
        return sum(self._view.held_lanes[pool] for pool in first.pools) // first.num_lanes

    def decide(self, count: int) -> Decision:
        """The best placement of the first `count` sequences."""
        if count not in self._decided:
            self._decided[count] = self._decide_carefully(count)
        return self._decided[count]

    def _decide_carefully(self, count: int) -> Decision:
        decision = self._decide(count, Memory.ALL) or self._decide(count, Memory.ALL_EVERYWHERE)
        assert decision is not None, "a placement that fits is at hand"
        if self._keeps_reserve(decision):
            return decision
        careful = self._decide(count, Memory.CAREFUL)
        if careful is None or not is_worth(1, self.num_running + count, careful.cycle_us, decision.cycle_us):
            return decision  # one more sequence, for which the pages are kept, would not make up for it
        return careful

    def ideal_us(self, count: int) -> float:
        """The time of a step if memory were no matter."""
        decision = self._decide(count, Memory.POOLED)
        assert decision is not None
        return decision.cycle_us

    def placements(self, decision: Decision) -> list[Placement]:
        by_stage = [
            [stage.owners(row) for row in zip(*counts, strict=True)]
            for stage, counts in zip(self._stages, decision.counts, strict=True)
        ]
        return [Placement(owners=owners) for owners in zip(*by_stage, strict=True)]

    def _lane(self, sequence: Request) -> Lane:
        num_tokens = len(sequence.token_ids)
        return Lane(
            pages=pages_of(sequence, self._view.page_size),
            kv_bytes=self._cost.kv_bytes(num_tokens + TOKENS_AHEAD),
            sent_bytes=num_tokens * self._cost.kv_bytes_per_token / HORIZON,
        )

    def _first_fitting(self) -> list[list[list[int]]]:
        """For each sequence up to the first that does not fit: lanes per stage and device, at home if possible."""
        room, found = Room(self._stages, self._view), []
        for lane in self._lanes:
            counts = room.homeward(lane.pages) if room.take_prompt(lane.pages) else None
            if counts is None:
                break
            room.take_lanes(counts, lane.pages)
            found.append(counts)
        return found

    # --- problems -----------------------------------------------------------------------------------------------------

    def _decide(self, count: int, memory: Memory) -> Decision | None:
        """Stage by stage, and once more where stages share workers, since the first did not know of the others.

        None if nothing was found within such memory; with all of it everywhere there is always something.
        """
        load, room, lanes = self._load.copy(), Room(self._stages, self._view), self._lanes[:count]
        for lane in lanes:
            room.take_prompt(lane.pages)
        chosen: list[Counts] = []
        for turn in range(len(self._stages) * (2 if len(self._stages) > 1 and self._view.plan.workers else 1)):
            index = turn % len(self._stages)
            if turn >= len(self._stages):
                self._add(load, index, chosen[index], -1)
            counts = self._solve_stage(index, lanes, load, room, memory)
            if counts is None:
                return None
            self._add(load, index, counts, 1)
            chosen[index : index + 1] = [counts]
        peaks_us = [self._peak_us(load, stage, lanes, memory) for stage in self._stages]
        cycles = zip(self._layers, self._dense_us, peaks_us, strict=True)
        return Decision(chosen, max(layers * (dense_us + peak_us) for layers, dense_us, peak_us in cycles))

    def _peak_us(self, load: FleetLoad, stage: StageDevices, lanes: list[Lane], memory: Memory) -> float:
        """The slowest device's time. Weak devices' is added to it: most of the time they will be in the way."""
        if memory is not Memory.ALL_EVERYWHERE:
            return load.peak_us(stage.pools)
        lane_us = [self._lane_us(load, stage, device, lanes) for device in range(len(stage.pools))]
        weak = {stage.pools[device] for device in weak_workers(stage, lane_us)}
        return load.peak_us(set(stage.pools) - weak) + load.peak_us(weak)

    def _solve_stage(self, index: int, lanes: list[Lane], load: FleetLoad, room: Room, memory: Memory) -> Counts | None:
        stage, free = self._stages[index], [max(0, pages) for pages in room.free[index]]
        if not lanes:
            return [[] for _ in stage.pools]
        if memory is Memory.POOLED:
            free = [UNLIMITED] * len(free)
        if memory is Memory.CAREFUL:
            free[: stage.num_homes] = [max(0, left) for left in self._beyond_reserve(stage)]
        lane_us = [self._lane_us(load, stage, device, lanes) for device in range(len(stage.pools))]
        weak = weak_workers(stage, lane_us) if memory is not Memory.ALL_EVERYWHERE else set()
        problem = Problem(
            num_lanes=stage.num_lanes,
            num_homes=stage.num_homes,
            start_us=[load.start_us(pool) for pool in stage.pools],
            floor_us=[load.rates(pool.rank).floor_us for pool in stage.pools],
            lane_us=lane_us,
            most_lanes=[0 if device in weak else most for device, most in enumerate(stage.most_lanes)],
            home_pages=[lane.pages.later if memory is Memory.CAREFUL else lane.pages.growth for lane in lanes],
            worker_pages=[lane.pages.later for lane in lanes],
            free_pages=free,
        )
        counts = self._solve(problem)
        if counts is None and memory is Memory.ALL_EVERYWHERE:
            return [
                list(row) for row in zip(*(at_home[index] for at_home in self._homeward[: len(lanes)]), strict=True)
            ]
        if counts is None or (memory is Memory.CAREFUL and not _grows_at_home(stage, room.free[index], counts, lanes)):
            return None
        return counts

    def _lane_us(self, load: FleetLoad, stage: StageDevices, device: int, lanes: list[Lane]) -> list[float]:
        rank = stage.pools[device].rank
        attention_us = load.lanes_us(rank, [lane.kv_bytes for lane in lanes])
        if device < stage.num_homes:
            return attention_us
        sending = self._cost.prompt_us_per_byte(rank)
        return [lane_us + sending * lane.sent_bytes for lane_us, lane in zip(attention_us, lanes, strict=True)]

    def _add(self, load: FleetLoad, index: int, counts: Counts, sign: int) -> None:
        for pool, held in zip(self._stages[index].pools, counts, strict=True):
            for lane, count in zip(self._lanes, held, strict=False):
                if count:
                    load.add(pool, sign * count, lane.kv_bytes)

    # --- room for prompts ---------------------------------------------------------------------------------------------

    def _beyond_reserve(self, stage: StageDevices) -> list[int]:
        """Pages of each home less those for the next prompts; what its lanes may take."""
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
