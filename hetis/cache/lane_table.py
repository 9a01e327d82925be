"""Host half of the cache: which pages hold which lane, for every pool of the fleet.

The lanes of a sequence all have the same length, so they grow together: one new page per lane, or none. Row `slot * G +
group` of a pool's page table belongs to a lane; with the home of a lane that lives elsewhere it belongs to the lane's
staging pages, for as long as its prompt is computed, and with the target of a lane that moves to the pages it moves to.

Letters: U lanes of one sequence in one pool, K pages, W pages of a lane.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping

import msgspec
import numpy as np

from hetis.cache.allocator import PageAllocator
from hetis.cache.integrity import check_lanes, check_pools
from hetis.cache.lanes import Int32, PoolLanes, SequenceLanes, Transit
from hetis.core.messages.step_command import PageEntries
from hetis.core.placement import FleetView, Move, Placement, PoolId, Shortage, pages_for
from hetis.core.plan import Plan


class RankUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of one rank, summed over its pools, and the lanes that live there."""

    pages_used: int
    pages_total: int
    pages_peak: int  # sum of its pools' peaks
    num_lanes: int
    lanes_peak: int  # sum of its pools' peaks


class CacheManager:
    """The one owner of the truth about pages. Ranks learn of it by `take_deltas`."""

    def __init__(
        self, plan: Plan, num_groups: int, num_pages: Mapping[int, int], page_size: int, max_num_seqs: int
    ) -> None:
        """`num_pages`: of each pool of a rank. `page_size`: tokens per page."""
        self._plan, self._num_groups, self._page_size, self._max_num_seqs = plan, num_groups, page_size, max_num_seqs
        self._homes = [[stage.home(group).rank for group in range(num_groups)] for stage in plan.stages]
        self._workers = {worker.rank for worker in plan.workers}
        self._pools = {pool: PageAllocator(num_pages[pool.rank]) for pool in pools_of(plan)}
        self._sequences: dict[int, SequenceLanes] = {}  # by slot
        self._num_lanes = dict.fromkeys(self._pools, 0)  # that live there
        self._lanes_peak = dict.fromkeys(self._pools, 0)
        # part, rows of lanes [U], their first new page index, the pages [U, K]
        self._unseen: list[tuple[PoolLanes, Int32, int, Int32]] = []

    # --- growing and shrinking ----------------------------------------------------------------------------------------

    def admit(self, slot: int, placement: Placement, num_tokens: int) -> Shortage | None:
        """Gives a new sequence its lanes and the pages of its first `num_tokens` tokens, staging included.

        All or nothing: with a `Shortage` the slot stays empty.
        """
        assert 0 <= slot < self._max_num_seqs, f"slot {slot} of {self._max_num_seqs}"
        assert slot not in self._sequences, f"slot {slot} is taken"
        lanes = self._lanes(slot, placement)
        shortage = self._grow(lanes, num_tokens)
        if shortage is None:
            self._sequences[slot] = lanes
            for part in lanes.owned:
                self._count(part)
        return shortage

    def reserve(self, slot: int, num_tokens: int) -> Shortage | None:
        """Makes all lanes of a sequence hold `num_tokens` tokens. All or nothing."""
        lanes = self._sequences[slot]
        if num_tokens > lanes.num_pages * self._page_size:
            return self._grow(lanes, num_tokens)
        lanes.num_tokens = num_tokens
        return None

    def end_prefill(self, slot: int) -> None:
        """The prompt is computed, and its K and V are where its lanes live: staging ends."""
        lanes = self._sequences[slot]
        self._free(lanes.staging)
        lanes.staging = []

    def release(self, slot: int) -> None:
        """Frees all pages of a sequence, and the slot."""
        lanes = self._sequences.pop(slot)
        for part in lanes.owned:
            self._num_lanes[part.pool] -= part.num_lanes
        self._free(lanes.parts)

    # --- moving -------------------------------------------------------------------------------------------------------

    def begin_move(self, move: Move) -> Shortage | None:
        """Takes pages for a lane at its target; from now on it grows in both places. All or nothing."""
        lanes, row = self._sequences[move.slot], self._row(move)
        assert not lanes.staging, f"slot {move.slot} is in prefill: its lanes stay"
        assert lanes.owner_of(row, move.stage).pool.rank == move.source, f"{move} starts from where the lane is not"
        assert move.target in (self._homes[move.stage][move.group], *self._workers), f"{move} leads nowhere"
        part = PoolLanes(PoolId(move.target, move.stage), [row])
        lacking = lanes.num_pages - self._pools[part.pool].num_free
        if lacking > 0:
            return Shortage({part.pool: lacking})
        self._take(part, 0, lanes.num_pages)
        lanes.transits.append(Transit(move, part))
        return None

    def transits(self) -> list[tuple[Transit, int]]:
        """Lanes on the move with the tokens of each, sequence by sequence."""
        return [(transit, lanes.num_tokens) for lanes in self._sequences.values() for transit in lanes.transits]

    def land(self, transit: Transit) -> None:
        """A lane lives at its target from now on; the pages at its source are free."""
        move, row = transit.move, self._row(transit.move)
        lanes = self._sequences[move.slot]
        lanes.transits.remove(transit)
        source = lanes.owner_of(row, move.stage)
        unseen = [_without(entry, row) if entry[0] is source else entry for entry in self._unseen]
        self._unseen = [entry for entry in unseen if entry[1].size]
        self._pools[source.pool].give(source.drop(row))
        self._num_lanes[source.pool] -= 1
        if not source.num_lanes:
            lanes.owned.remove(source)
        lanes.owned.append(transit.part)
        self._count(transit.part)

    def cancel(self, transit: Transit) -> None:
        """A lane stays at its source; its pages at the target are free."""
        self._sequences[transit.move.slot].transits.remove(transit)
        self._free([transit.part])

    def owners(self, slot: int) -> tuple[tuple[int, ...], ...]:
        """[stage][G] ranks on which the lanes of a sequence live, or will when they arrive."""
        lanes, first = self._sequences[slot], slot * self._num_groups
        owners = [[0] * self._num_groups for _ in self._homes]
        for part in [*lanes.owned, *(transit.part for transit in lanes.transits)]:
            for row in part.row_U:
                owners[part.pool.stage][int(row) - first] = part.pool.rank
        return tuple(map(tuple, owners))

    def is_moving(self, slot: int) -> bool:
        return bool(self._sequences[slot].transits)

    def num_tokens(self, slot: int) -> int:
        """Number of tokens that the sequence has pages for."""
        return self._sequences[slot].num_tokens

    def num_leaving(self, pool: PoolId) -> int:
        """Pages that come free when lanes which are on the move have arrived."""
        return self._num_moving(lambda transit: PoolId(transit.move.source, transit.move.stage) == pool)

    def num_arriving(self, pool: PoolId) -> int:
        """Pages of lanes that are on their way there."""
        return self._num_moving(lambda transit: transit.part.pool == pool)

    def _num_moving(self, is_meant: Callable[[Transit], bool]) -> int:
        sequences = self._sequences.values()
        return sum(lanes.num_pages for lanes in sequences for transit in lanes.transits if is_meant(transit))

    def _row(self, move: Move) -> int:
        return move.slot * self._num_groups + move.group

    def _count(self, part: PoolLanes) -> None:
        """Lanes that live in a pool from now on."""
        self._num_lanes[part.pool] += part.num_lanes
        self._lanes_peak[part.pool] = max(self._lanes_peak[part.pool], self._num_lanes[part.pool])

    # --- news for the ranks -------------------------------------------------------------------------------------------

    def take_deltas(self) -> dict[PoolId, PageEntries]:
        """New entries of page tables since the last call; those freed again meanwhile are left out."""
        columns: dict[PoolId, list[Int32]] = defaultdict(list)
        for part, row_U, first, page_UK in self._unseen:
            entry_3UK = np.empty((3, *page_UK.shape), dtype=np.int32)
            entry_3UK[0] = row_U[:, None]
            entry_3UK[1] = np.arange(first, first + page_UK.shape[1])
            entry_3UK[2] = page_UK
            columns[part.pool].append(entry_3UK.reshape(3, -1))
        self._unseen.clear()
        return {pool: PageEntries(*np.concatenate(columns[pool], axis=1)) for pool in sorted(columns)}

    def _lanes(self, slot: int, placement: Placement) -> SequenceLanes:
        owned: dict[PoolId, list[int]] = defaultdict(list)
        staging: dict[PoolId, list[int]] = defaultdict(list)
        for stage, (owners, homes) in enumerate(zip(placement.owners, self._homes, strict=True)):
            for group, (owner, home) in enumerate(zip(owners, homes, strict=True)):
                row = slot * self._num_groups + group
                owned[PoolId(owner, stage)].append(row)
                if owner != home:
                    assert owner in self._workers, f"group {group} of stage {stage} cannot live on rank {owner}"
                    staging[PoolId(home, stage)].append(row)
        return SequenceLanes(*([PoolLanes(pool, rows) for pool, rows in part.items()] for part in (owned, staging)))

    def _grow(self, lanes: SequenceLanes, num_tokens: int) -> Shortage | None:
        count = pages_for(num_tokens, self._page_size) - lanes.num_pages
        needed: Counter[PoolId] = Counter()
        for part in lanes.parts:
            needed[part.pool] += part.num_lanes * count
        missing = {pool: pages - self.free_pages(pool) for pool, pages in needed.items()}
        missing = {pool: pages for pool, pages in missing.items() if pages > 0}
        if missing:
            return Shortage(missing)
        for part in lanes.parts:
            self._take(part, lanes.num_pages, count)
        lanes.num_pages += count
        lanes.num_tokens = num_tokens
        return None

    def _take(self, part: PoolLanes, first: int, count: int) -> None:
        """`count` pages more for each lane, of which it has `first`."""
        page_UK = self._pools[part.pool].take(part.num_lanes * count).reshape(part.num_lanes, count)
        part.blocks.append(page_UK)
        self._unseen.append((part, part.row_U, first, page_UK))

    def _free(self, parts: list[PoolLanes]) -> None:
        for part in parts:
            self._pools[part.pool].give(part.pages)
        if self._unseen:
            self._unseen = [entry for entry in self._unseen if entry[0] not in parts]

    # --- looking ------------------------------------------------------------------------------------------------------

    @property
    def pools(self) -> Collection[PoolId]:
        """All pools of the fleet."""
        return self._pools.keys()

    def free_pages(self, pool: PoolId) -> int:
        return self._pools[pool].num_free

    def is_in(self, slot: int, pools: Collection[PoolId]) -> bool:
        """Whether the sequence has pages in one of `pools`."""
        return any(part.pool in pools for part in self._sequences[slot].parts)

    def pools_to_grow(self, slot: int, num_tokens: int) -> set[PoolId]:
        """In which a sequence has to take pages in order to hold `num_tokens` tokens."""
        lanes = self._sequences[slot]
        if num_tokens <= lanes.num_pages * self._page_size:
            return set()
        return {part.pool for part in lanes.parts}

    def view(self, without: Collection[int] = ()) -> FleetView:
        """What a dispatcher needs to know. Each lane that lives in a pool, or moves there, is promised a page more.

        `without`: slots that count as released.
        """
        free_pages = {pool: pages.num_free for pool, pages in self._pools.items()}
        held_lanes, held_tokens = dict.fromkeys(self._pools, 0), dict.fromkeys(self._pools, 0)
        for slot, lanes in self._sequences.items():
            if slot in without:
                for part in lanes.parts:
                    free_pages[part.pool] += part.num_lanes * lanes.num_pages
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
            plan=self._plan,
            page_size=self._page_size,
            free_pages=free_pages,
            held_lanes=held_lanes,
            held_tokens=held_tokens,
        )

    def usage(self) -> dict[int, RankUsage]:
        """By rank."""
        return {member.rank: self._usage(member.rank) for member in self._plan.members()}

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
        """AssertionError unless every page is free or in exactly one lane, and every lane is as long as it must be."""
        for slot, lanes in self._sequences.items():
            check_lanes(slot, lanes, self._homes, self._page_size)
        check_pools(self._pools, self._sequences.values(), self._num_lanes)
        known = {id(part) for lanes in self._sequences.values() for part in lanes.parts}
        assert all(id(part) in known for part, *_ in self._unseen), "a page of a freed lane is still to be announced"


def pools_of(plan: Plan) -> list[PoolId]:
    """One pool per home, and one per worker and stage."""
    homes = [PoolId(home.rank, s) for s, stage in enumerate(plan.stages) for home in stage.homes]
    return homes + [PoolId(worker.rank, stage) for worker in plan.workers for stage in range(len(plan.stages))]


def _without(entry: tuple[PoolLanes, Int32, int, Int32], row: int) -> tuple[PoolLanes, Int32, int, Int32]:
    part, row_U, first, page_UK = entry
    keep = row_U != row
    return part, row_U[keep], first, page_UK[keep]
