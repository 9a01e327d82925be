"""Host half of the cache: which pages hold which lane, for every pool of the fleet.

Each pool has a page table with a line for every lane index. The home of a lane that lives elsewhere keeps the lane's
staging pages there, for as long as its prompt is computed; the target of a migrating lane keeps the pages that are
filled. The `CacheManager` alone allocates and frees; the ranks' tables follow what it announces.

Letters: U lanes of one sequence in one pool, K pages, W pages of a lane.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from hetis.cache.allocator import PageAllocator
from hetis.cache.fleet_view import fleet_view
from hetis.cache.integrity import check_lanes, check_pools
from hetis.cache.lanes import Int32, PoolLanes, SequenceLanes, Transit
from hetis.core.messages.step_command import PageEntries
from hetis.core.placement import FleetView, Move, Placement, PoolId, Shortage, pages_for, pools_of
from hetis.core.plan import Plan


class _NewPages(NamedTuple):
    """Pages that have been allocated and not yet announced to the ranks."""

    part: PoolLanes
    lane_U: Int32
    first: int  # page index in the lanes
    page_UK: Int32

    def without(self, lane: int) -> "_NewPages":
        keep = self.lane_U != lane
        return self._replace(lane_U=self.lane_U[keep], page_UK=self.page_UK[keep])


class RankUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of one rank, summed over its pools, and the lanes that live there."""

    pages_used: int
    pages_total: int
    pages_peak: int  # sum of its pools' peaks
    num_lanes: int
    lanes_peak: int  # sum of its pools' peaks


class CacheManager:
    """Allocates the pages of all sequences, by slot. `take_deltas` says what the ranks have to enter."""

    def __init__(
        self, plan: Plan, num_groups: int, num_pages: Mapping[int, int], page_size: int, max_num_seqs: int
    ) -> None:
        """`num_pages`: of each pool, by rank. `page_size`: tokens per page."""
        self._plan, self._num_groups, self._page_size, self._max_num_seqs = plan, num_groups, page_size, max_num_seqs
        self._pools = {pool: PageAllocator(num_pages[pool.rank]) for pool in pools_of(plan)}
        self._sequences: dict[int, SequenceLanes] = {}  # by slot
        self._num_lanes = dict.fromkeys(self._pools, 0)  # that live there
        self._lanes_peak = dict.fromkeys(self._pools, 0)
        self._unseen: list[_NewPages] = []

    # --- growing and shrinking ----------------------------------------------------------------------------------------

    def admit(self, slot: int, placement: Placement, num_tokens: int) -> Shortage | None:
        """Allocates the lanes of a new sequence for its first `num_tokens` tokens, staging included.

        All or nothing: with a `Shortage` the slot stays empty.
        """
        assert 0 <= slot < self._max_num_seqs, f"slot {slot} of {self._max_num_seqs}"
        assert slot not in self._sequences, f"slot {slot} is taken"
        lanes = self._lanes(slot, placement)
        shortage = self._grow(lanes, lanes.parts, num_tokens)
        if shortage is None:
            self._sequences[slot] = lanes
            for part in lanes.owned:
                self._count(part)
        return shortage

    def allocate(self, slot: int, num_tokens: int) -> Shortage | None:
        """Lets all lanes of a sequence hold `num_tokens` tokens, with new pages where needed. All or nothing."""
        lanes = self._sequences[slot]
        if num_tokens > lanes.num_pages * self._page_size:
            return self._grow(lanes, lanes.growing, num_tokens)
        lanes.num_tokens = num_tokens
        return None

    def end_prefill(self, slot: int) -> None:
        """Frees the staging pages: the prompt is computed, and its K and V are where its lanes live."""
        lanes = self._sequences[slot]
        self._free(lanes.staging)
        lanes.staging = []

    def release(self, slot: int) -> None:
        """Frees all pages of a sequence, and the slot."""
        lanes = self._sequences.pop(slot)
        for part in lanes.owned:
            self._num_lanes[part.pool] -= part.num_lanes
        self._free(lanes.parts)

    # --- migration ----------------------------------------------------------------------------------------------------

    def begin_move(self, move: Move) -> Shortage | None:
        """Allocates a lane's pages at its target; from now on it grows in both places. All or nothing."""
        lanes, lane = self._sequences[move.slot], self._lane(move)
        assert not lanes.staging, f"slot {move.slot} is in prefill: its lanes stay"
        source, home = lanes.owner_of(lane, move.stage).pool.rank, self._plan.home_ranks[move.stage][move.group]
        assert source == move.source, f"the lane does not live at the source: {move}"
        assert move.target in (home, *self._plan.worker_ranks), f"the target is neither home nor worker: {move}"
        part = PoolLanes(PoolId(move.target, move.stage), [lane])
        lacking = lanes.num_pages - self._pools[part.pool].num_free
        if lacking > 0:
            return Shortage({part.pool: lacking})
        self._extend(part, 0, lanes.num_pages)
        lanes.transits.append(Transit(move, part))
        return None

    def transits(self) -> list[tuple[Transit, int]]:
        """Migrating lanes with the tokens of each, sequence by sequence."""
        return [(transit, lanes.num_tokens) for lanes in self._sequences.values() for transit in lanes.transits]

    def commit(self, transit: Transit) -> None:
        """Makes a lane live at its target, and frees its pages at its source."""
        move, lane = transit.move, self._lane(transit.move)
        lanes = self._sequences[move.slot]
        lanes.transits.remove(transit)
        source = lanes.owner_of(lane, move.stage)
        unseen = [new.without(lane) if new.part is source else new for new in self._unseen]
        self._unseen = [new for new in unseen if new.lane_U.size]
        self._pools[source.pool].free(source.remove(lane))
        self._num_lanes[source.pool] -= 1
        if not source.num_lanes:
            lanes.owned.remove(source)
        lanes.owned.append(transit.part)
        self._count(transit.part)

    def cancel(self, transit: Transit) -> None:
        """Ends a migration: the lane stays at its source, and its pages at the target are free."""
        self._sequences[transit.move.slot].transits.remove(transit)
        self._free([transit.part])

    def owners(self, slot: int) -> tuple[tuple[int, ...], ...]:
        """[stage][G] ranks on which the lanes of a sequence live, or will after their migration."""
        lanes, first = self._sequences[slot], slot * self._num_groups
        owners = [[0] * self._num_groups for _ in self._plan.stages]
        for part in [*lanes.owned, *(transit.part for transit in lanes.transits)]:
            for lane in part.lane_U:
                owners[part.pool.stage][int(lane) - first] = part.pool.rank
        return tuple(map(tuple, owners))

    def is_moving(self, slot: int) -> bool:
        """Whether a lane of the sequence is migrating."""
        return bool(self._sequences[slot].transits)

    def num_tokens(self, slot: int) -> int:
        """Number of tokens that the sequence has pages for."""
        return self._sequences[slot].num_tokens

    def num_leaving(self, pool: PoolId) -> int:
        """Pages that come free in a pool when the migrations are committed."""
        return self._num_pages_of(lambda transit: PoolId(transit.move.source, transit.move.stage) == pool)

    def num_arriving(self, pool: PoolId) -> int:
        """Pages of the lanes that migrate to a pool."""
        return self._num_pages_of(lambda transit: transit.part.pool == pool)

    def _num_pages_of(self, is_meant: Callable[[Transit], bool]) -> int:
        sequences = self._sequences.values()
        return sum(lanes.num_pages for lanes in sequences for transit in lanes.transits if is_meant(transit))

    def _lane(self, move: Move) -> int:
        return move.slot * self._num_groups + move.group

    def _count(self, part: PoolLanes) -> None:
        """Adds lanes that live in a pool from now on."""
        self._num_lanes[part.pool] += part.num_lanes
        self._lanes_peak[part.pool] = max(self._lanes_peak[part.pool], self._num_lanes[part.pool])

    # --- announcements to the ranks -----------------------------------------------------------------------------------

    def take_deltas(self) -> dict[PoolId, PageEntries]:
        """Entries of page tables that are new since the last call, less those freed meanwhile."""
        columns: dict[PoolId, list[Int32]] = defaultdict(list)
        for part, lane_U, first, page_UK in self._unseen:
            entry_3UK = np.empty((3, *page_UK.shape), dtype=np.int32)
            entry_3UK[0] = lane_U[:, None]
            entry_3UK[1] = np.arange(first, first + page_UK.shape[1])
            entry_3UK[2] = page_UK
            columns[part.pool].append(entry_3UK.reshape(3, -1))
        self._unseen.clear()
        return {pool: PageEntries(*np.concatenate(columns[pool], axis=1)) for pool in sorted(columns)}

    # --- pages --------------------------------------------------------------------------------------------------------

    def _lanes(self, slot: int, placement: Placement) -> SequenceLanes:
        owned: dict[PoolId, list[int]] = defaultdict(list)
        staging: dict[PoolId, list[int]] = defaultdict(list)
        for stage, (owners, homes) in enumerate(zip(placement.owners, self._plan.home_ranks, strict=True)):
            for group, (owner, home) in enumerate(zip(owners, homes, strict=True)):
                lane = slot * self._num_groups + group
                owned[PoolId(owner, stage)].append(lane)
                if owner != home:
                    assert self._plan.is_worker(owner), f"group {group} of stage {stage} cannot live on rank {owner}"
                    staging[PoolId(home, stage)].append(lane)
        return SequenceLanes(*([PoolLanes(pool, ids) for pool, ids in part.items()] for part in (owned, staging)))

    def _grow(self, lanes: SequenceLanes, parts: list[PoolLanes], num_tokens: int) -> Shortage | None:
        count = pages_for(num_tokens, self._page_size) - lanes.num_pages
        needed: Counter[PoolId] = Counter()
        for part in parts:
            needed[part.pool] += part.num_lanes * count
        missing = {pool: pages - self.free_pages(pool) for pool, pages in needed.items()}
        missing = {pool: pages for pool, pages in missing.items() if pages > 0}
        if missing:
            return Shortage(missing)
        for part in parts:
            self._extend(part, lanes.num_pages, count)
        lanes.num_pages += count
        lanes.num_tokens = num_tokens
        return None

    def _extend(self, part: PoolLanes, first: int, count: int) -> None:
        """Allocates `count` pages more for each lane, which has `first`."""
        page_UK = self._pools[part.pool].allocate(part.num_lanes * count).reshape(part.num_lanes, count)
        part.blocks.append(page_UK)
        self._unseen.append(_NewPages(part, part.lane_U, first, page_UK))

    def _free(self, parts: list[PoolLanes]) -> None:
        for part in parts:
            self._pools[part.pool].free(part.pages)
        if self._unseen:
            self._unseen = [new for new in self._unseen if new.part not in parts]

    # --- the state ----------------------------------------------------------------------------------------------------

    @property
    def pools(self) -> Collection[PoolId]:
        """All pools of the fleet."""
        return self._pools.keys()

    def free_pages(self, pool: PoolId) -> int:
        return self._pools[pool].num_free

    def is_in(self, slot: int, pools: Collection[PoolId]) -> bool:
        """Whether the sequence has pages in one of `pools`."""
        return any(part.pool in pools for part in self._sequences[slot].parts)

    def is_staged_in(self, slot: int, pools: Collection[PoolId]) -> bool:
        """Whether the sequence has staging pages in one of `pools`."""
        return any(part.pool in pools for part in self._sequences[slot].staging)

    def pools_to_grow(self, slot: int, num_tokens: int) -> set[PoolId]:
        """Pools from which a sequence needs pages in order to hold `num_tokens` tokens."""
        lanes = self._sequences[slot]
        if num_tokens <= lanes.num_pages * self._page_size:
            return set()
        return {part.pool for part in lanes.growing}

    def view(self, without: Collection[int] = ()) -> FleetView:
        """What a dispatcher gets to see. `without`: slots that count as released."""
        return fleet_view(self._plan, self._page_size, self._pools, self._sequences, without)

    def usage(self) -> dict[int, RankUsage]:
        """Pages and lanes of each rank."""
        return {rank: self._usage(rank) for rank in self._plan.ranks}

    def _usage(self, rank: int) -> RankUsage:
        own = [pool for pool in self._pools if pool.rank == rank]
        return RankUsage(
            pages_used=sum(self._pools[pool].num_used for pool in own),
            pages_total=sum(self._pools[pool].num_pages for pool in own),
            pages_peak=sum(self._pools[pool].peak for pool in own),
            num_lanes=sum(self._num_lanes[pool] for pool in own),
            lanes_peak=sum(self._lanes_peak[pool] for pool in own),
        )

    def check_integrity(self) -> None:
        """AssertionError where an invariant of `integrity.py` does not hold."""
        for slot, lanes in self._sequences.items():
            check_lanes(slot, lanes, self._plan.home_ranks, self._page_size)
        check_pools(self._pools, self._sequences.values(), self._num_lanes)
        known = {id(part) for lanes in self._sequences.values() for part in lanes.parts}
        assert all(id(new.part) in known for new in self._unseen), "a page of a freed lane is still to be announced"
