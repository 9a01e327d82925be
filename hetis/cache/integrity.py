"""Invariants of the `CacheManager` between any two of its calls: AssertionError where one does not hold."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hetis.cache.allocator import PageAllocator
from hetis.cache.lanes import Int32, PoolLanes, SequenceLanes
from hetis.core.placement import PoolId, pages_for


def check_pools(
    pools: Mapping[PoolId, PageAllocator], sequences: Iterable[SequenceLanes], num_lanes: Mapping[PoolId, int]
) -> None:
    """Every page is free or in exactly one lane, and `num_lanes` live in each pool."""
    pages: dict[PoolId, list[Int32]] = {pool: [allocator.free_pages] for pool, allocator in pools.items()}
    held: Counter[PoolId] = Counter()
    for lanes in sequences:
        for part in lanes.parts:
            pages[part.pool].append(part.pages.ravel())
        for part in lanes.owned:
            held[part.pool] += part.num_lanes
    for pool, parts in pages.items():
        found, expected = np.sort(np.concatenate(parts)), np.arange(pools[pool].num_pages)
        assert np.array_equal(found, expected), f"pages of {pool} are lost or owned twice"
    assert held == Counter(num_lanes), "lanes are miscounted"


def check_lanes(slot: int, lanes: SequenceLanes, home_ranks: Sequence[Sequence[int]], page_size: int) -> None:
    """Every lane of a sequence lives in one place; all have the same length, staging at most that. `home_ranks`:
    [stage][G]."""
    assert lanes.num_pages >= pages_for(lanes.num_tokens, page_size), f"slot {slot} is short of pages"
    assert all(part.pages.shape == (part.num_lanes, lanes.num_pages) for part in lanes.growing), (
        f"lanes of slot {slot} differ in length"
    )
    assert all(part.num_pages <= part.num_lanes * lanes.num_pages for part in lanes.staging), (
        f"slot {slot} stages more than its lanes hold"
    )
    num_groups = len(home_ranks[0])
    first = slot * num_groups
    every_lane = [(stage, lane) for stage in range(len(home_ranks)) for lane in range(first, first + num_groups)]
    assert sorted(_stages_and_lanes(lanes.owned)) == every_lane, f"slot {slot} lacks a lane or has one twice"
    for transit in lanes.transits:
        source = lanes.owner_of(first + transit.move.group, transit.move.stage).pool.rank
        assert source == transit.move.source != transit.part.pool.rank, f"slot {slot}: {transit.move} is not under way"
    for stage, lane in _stages_and_lanes(lanes.staging):
        home = PoolId(home_ranks[stage][lane - first], stage)
        at_home = any(part.pool == home and lane in part.lane_U for part in lanes.owned)
        assert not at_home, f"slot {slot} stages a lane that lives at home"


def _stages_and_lanes(parts: Iterable[PoolLanes]) -> list[tuple[int, int]]:
    return [(part.pool.stage, int(lane)) for part in parts for lane in part.lane_U]
