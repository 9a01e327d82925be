"""What a dispatcher gets to see of the cache."""

from collections.abc import Collection, Mapping

from hetis.cache.allocator import PageAllocator
from hetis.cache.lanes import SequenceLanes
from hetis.core.placement import FleetView, PoolId
from hetis.core.plan import Plan


def fleet_view(
    plan: Plan,
    page_size: int,
    pools: Mapping[PoolId, PageAllocator],
    sequences: Mapping[int, SequenceLanes],
    without: Collection[int],
) -> FleetView:
    """Free pages and lanes of each pool. `sequences`: by slot; those in `without` count as released.

    Each lane that lives in a pool, or migrates there, is promised a page to grow.
    """
    free_pages = {pool: pages.num_free for pool, pages in pools.items()}
    held_lanes, held_tokens = dict.fromkeys(pools, 0), dict.fromkeys(pools, 0)
    for slot, lanes in sequences.items():
        if slot in without:
            for part in lanes.parts:
                free_pages[part.pool] += part.num_pages
            continue
        for part in lanes.owned:
            free_pages[part.pool] -= part.num_lanes
            held_lanes[part.pool] += part.num_lanes
            held_tokens[part.pool] += part.num_lanes * lanes.num_tokens
        for transit in lanes.transits:
            source, target = PoolId(transit.move.source, transit.move.stage), transit.part.pool
            free_pages[target] -= 1
            held_lanes[source] -= 1
            held_lanes[target] += 1
            held_tokens[source] -= lanes.num_tokens
            held_tokens[target] += lanes.num_tokens
    return FleetView(
        plan=plan, page_size=page_size, free_pages=free_pages, held_lanes=held_lanes, held_tokens=held_tokens
    )
