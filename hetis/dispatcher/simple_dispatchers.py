"""Dispatchers that know no speeds: by free pages, the same number everywhere, and on the primaries alone.

They serve fleets whose speeds were not measured, and comparison. Each is a function of its arguments.
"""

from collections.abc import Callable

from hetis.core.placement import FleetView, Placement, PoolId
from hetis.core.plan import Plan
from hetis.core.request import Sequence
from hetis.dispatcher.insertion import insert
from hetis.dispatcher.load import StageDevices, stage_devices
from hetis.dispatcher.problem import Problem
from hetis.dispatcher.room import Pages, Room, lacking, pages_of

PlaceStage = Callable[[StageDevices, list[int], Pages], list[int] | None]  # stage, free pages [N], pages -> lanes [N]


class EvenDispatcher:
    """The same number of lanes on every device as far as pages allow; homes get the ones left over."""

    def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
        return _in_order(sequences, view, _evenly)

    def why_not(self, sequence: Sequence, view: FleetView) -> str:
        return lacking(sequence, view)


class PrimaryOnlyDispatcher:
    """All lanes at home, as if there were no attention workers."""

    def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
        return _in_order(sequences, view, _at_home)

    def why_not(self, sequence: Sequence, view: FleetView) -> str:
        return lacking(sequence, view)


def _in_order(sequences: list[Sequence], view: FleetView, place: PlaceStage) -> list[Placement | None]:
    """No sequence overtakes: after the first that does not fit there are no more placements."""
    stages = stage_devices(view.plan)
    room = Room(stages, view)
    placements: list[Placement | None] = [None] * len(sequences)
    for index, sequence in enumerate(sequences):
        pages = pages_of(sequence, view.page_size)
        if not room.take_prompt(pages):
            break
        counts = [place(stage, free, pages) for stage, free in zip(stages, room.free, strict=True)]
        found = [row for row in counts if row is not None]
        if len(found) < len(stages):
            break
        room.take_lanes(found, pages)
        placements[index] = Placement(owners=tuple(stage.owners(row) for stage, row in zip(stages, found, strict=True)))
    return placements


def _evenly(stage: StageDevices, free: list[int], pages: Pages) -> list[int] | None:
    """[N] lanes of one sequence: the placement problem in which a lane costs the same on every device."""
    num_devices = len(stage.pools)
    problem = Problem(
        num_lanes=stage.num_lanes,
        num_homes=stage.num_homes,
        start_us=[0.0] * num_devices,
        floor_us=[0.0] * num_devices,
        lane_us=[[1.0]] * num_devices,
        most_lanes=list(stage.most_lanes),
        home_pages=[pages.growth],
        worker_pages=[pages.later],
        free_pages=[max(0, left) for left in free],
    )
    counts = insert(problem, [0])
    return None if counts is None else [held[0] for held in counts]


def _at_home(stage: StageDevices, free: list[int], pages: Pages) -> list[int] | None:
    groups = stage.most_lanes[: stage.num_homes]
    if any(count * pages.growth > left for count, left in zip(groups, free, strict=False)):
        return None
    return [*groups, *[0] * (len(stage.pools) - stage.num_homes)]


class ProportionalDispatcher:
    """Spreads the head groups of each home primary over that primary and all attention workers by their free pages.

    Largest remainder, ties to the primary, then to the lower rank. In a stage, for a home with G head groups, and a
    sequence whose lanes take `now` pages each and `later` pages after some growth (x_i: lanes on pool i, 0 the home):

        minimise    sum_i (x_i - G * free_i / sum free)^2
        subject to  sum_i x_i = G
                    G * now + x_0 * (later - now) <= free_0     (staging or lane: the home holds the whole prompt)
                    x_i * later <= free_i                       for workers i
    """

    def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
        left = dict(view.free_pages)
        return [self._place(sequence, view, left) for sequence in sequences]

    def why_not(self, sequence: Sequence, view: FleetView) -> str:
        return lacking(sequence, view)

    def _place(self, sequence: Sequence, view: FleetView, left: dict[PoolId, int]) -> Placement | None:
        """Takes the pages of what it places out of `left`."""
        now, later = pages_of(sequence, view.page_size)
        # Homes of a stage choose one after the other. If a later one finds no place on the workers then, each keeps as
        # much as it can: that succeeds whenever a placement exists.
        for home_first in (False, True):
            attempt = dict(left)
            owners = [
                _place_stage(view.plan, stage, now, later, attempt, home_first)
                for stage in range(len(view.plan.stages))
            ]
            if all(owners):
                left.update(attempt)
                return Placement(owners=tuple(map(tuple, owners)))
        return None


def _place_stage(plan: Plan, stage: int, now: int, later: int, left: dict[PoolId, int], home_first: bool) -> list[int]:
    """The owner of each head group in one stage, taken out of `left`; empty when they do not fit."""
    owners: list[int] = []
    for primary in plan.stages[stage].homes:
        pools = [PoolId(rank, stage) for rank in (primary.rank, *plan.worker_ranks)]
        home, prompt, growth = pools[0], primary.num_groups * now, later - now
        spare = left[home] - prompt
        if spare < 0:
            return []
        capacities = [left[pool] // later for pool in pools]
        capacities[0] = spare // growth if growth else primary.num_groups
        weights = [int(pool == home) if home_first else left[pool] for pool in pools]
        counts = spread(primary.num_groups, weights, capacities)
        if counts is None:
            return []
        left[home] -= prompt + counts[0] * growth
        for pool, count in zip(pools[1:], counts[1:], strict=True):
            left[pool] -= count * later
        owners += [pool.rank for pool, count in zip(pools, counts, strict=True) for _ in range(count)]
    return owners


def spread(num_lanes: int, weights: list[int], capacities: list[int]) -> list[int] | None:
    """Lanes per place in proportion to `weights`, at most `capacities`; None when they do not fit.

    Each lane goes to the place that lacks most of its share, ties to the first place. Without capacities that is the
    rule of largest remainders; with them it still minimises the squared distance to the exact shares, which is convex
    and separable. Negative weights and capacities count as 0.
    """
    if sum(max(0, capacity) for capacity in capacities) < num_lanes:
        return None
    weights = [max(0, weight) for weight in weights]
    total = sum(weights)
    counts = [0] * len(weights)
    for _ in range(num_lanes):
        open_places = [i for i, count in enumerate(counts) if count < capacities[i]]
        place = max(open_places, key=lambda i: num_lanes * weights[i] - counts[i] * total)
        counts[place] += 1
    return counts
