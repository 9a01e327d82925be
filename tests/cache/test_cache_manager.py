"""Every page has one owner, and the ranks' page tables agree with the cache manager."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.cache.cache_manager import CacheManager, RankUsage
from hetis.core.messages.step_command import PageEntries
from hetis.core.placement import Move, Placement, PoolId, Shortage, pools_of
from hetis.core.plan import Plan
from tests.scheduler.toy_engine import make_plan
from tests.scheduler.toy_ranks import replay

PAGE_SIZE = 3


def manager(plan: Plan, num_pages: dict[int, int], max_num_seqs: int = 4) -> CacheManager:
    return CacheManager(plan, plan.num_groups, num_pages, PAGE_SIZE, max_num_seqs)


def entries_of(deltas: dict[PoolId, PageEntries]) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    """(lane, page index, page) of each entry, by (rank, stage)."""
    return {
        (pool.rank, pool.stage): list(zip(*(column.tolist() for column in entries), strict=True))
        for pool, entries in deltas.items()
    }


def test_pools_of_a_plan() -> None:
    plan = make_plan([[2], [1, 1]], 2)
    pools = [(0, 0), (1, 1), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
    assert pools_of(plan) == [PoolId(*pool) for pool in pools]
    plan = make_plan([[0, 2], [1, 0, 1]], 1)
    assert pools_of(plan) == [PoolId(*pool) for pool in [(1, 0), (2, 1), (4, 1), (5, 0), (5, 1)]], "of homes alone"
    cache = manager(plan, {0: 0, 1: 9, 2: 9, 3: 0, 4: 9, 5: 9})
    assert cache.admit(0, Placement(owners=((1, 5), (5, 4))), 4) is None
    cache.check_integrity()
    assert cache.usage()[3] == RankUsage(pages_used=0, pages_total=0, pages_peak=0, num_lanes=0, lanes_peak=0)


def test_a_sequence_from_prompt_to_end() -> None:
    """Groups 0 and 1 have their home on rank 0, group 2 on rank 1; group 1 lives on the worker, rank 2."""
    cache = manager(make_plan([[2, 1]], 1), {0: 9, 1: 9, 2: 9})
    assert cache.admit(1, Placement(owners=((0, 2, 1),)), 5) is None
    assert entries_of(cache.take_deltas()) == {  # lane = slot * 3 + group
        (0, 0): [(3, 0, 0), (3, 1, 1), (4, 0, 2), (4, 1, 3)],  # group 1 in staging
        (1, 0): [(5, 0, 0), (5, 1, 1)],
        (2, 0): [(4, 0, 0), (4, 1, 1)],
    }
    assert cache.allocate(1, 6) is None
    cache.end_prefill(1)
    assert cache.pools_to_grow(1, 6) == set(), "pages have room for six"
    assert cache.pools_to_grow(1, 7) == {PoolId(rank, 0) for rank in range(3)}
    assert cache.take_deltas() == {}
    assert cache.allocate(1, 7) is None
    assert entries_of(cache.take_deltas()) == {(0, 0): [(3, 2, 2)], (1, 0): [(5, 2, 2)], (2, 0): [(4, 2, 2)]}
    assert cache.usage()[0] == RankUsage(pages_used=3, pages_total=9, pages_peak=4, num_lanes=1, lanes_peak=1)
    view = cache.view()
    assert view.free_pages == {PoolId(rank, 0): 9 - 3 - 1 for rank in range(3)}
    assert view.held_lanes == {PoolId(rank, 0): 1 for rank in range(3)}
    assert view.held_tokens == {PoolId(rank, 0): 7 for rank in range(3)}
    cache.release(1)
    cache.check_integrity()
    assert [cache.free_pages(PoolId(rank, 0)) for rank in range(3)] == [9, 9, 9]
    assert cache.usage()[2] == RankUsage(pages_used=0, pages_total=9, pages_peak=3, num_lanes=0, lanes_peak=1)


def test_the_peaks_of_pages_and_lanes_are_those_since_the_start() -> None:
    cache = manager(make_plan([[2]]), {0: 9})
    for slots in ((0, 1), (2,)):
        for slot in slots:
            cache.admit(slot, Placement(owners=((0, 0),)), 1)
        for slot in slots:
            cache.release(slot)
    assert (cache.usage()[0].lanes_peak, cache.usage()[0].pages_peak) == (4, 4)


def test_a_migrating_lane_is_promised_a_page_at_its_target() -> None:
    cache = manager(make_plan([[2]], 1), {0: 9, 1: 9})
    cache.admit(0, Placement(owners=((0, 0),)), 5)
    assert cache.begin_move(Move(slot=0, stage=0, group=1, source=0, target=1)) is None
    view = cache.view()
    home, worker = PoolId(0, 0), PoolId(1, 0)
    assert view.free_pages == {home: 9 - 4 - 2, worker: 9 - 2 - 1}, "its pages at the source are taken until the commit"
    assert view.held_lanes == {home: 1, worker: 1}
    assert view.held_tokens == {home: 5, worker: 5}


def test_a_shortage_counts_lanes_and_staging_and_changes_nothing() -> None:
    cache = manager(make_plan([[2, 1]], 1), {0: 5, 1: 1, 2: 9})
    placement = Placement(owners=((0, 2, 2),))
    assert cache.admit(0, placement, 9) == Shortage({PoolId(0, 0): 1, PoolId(1, 0): 2})
    assert cache.admit(0, placement, 3) is None
    assert len(cache.take_deltas()) == 3
    assert cache.allocate(0, 18) == Shortage({PoolId(0, 0): 2, PoolId(2, 0): 3})
    assert cache.take_deltas() == {}


def test_staging_does_not_grow() -> None:
    """The last chunk of a prompt of 3 tokens may be in flight when the next token gets its pages."""
    cache = manager(make_plan([[2, 1]], 1), {0: 5, 1: 1, 2: 9})
    assert cache.admit(0, Placement(owners=((0, 2, 2),)), 3) is None
    assert cache.allocate(0, 4) is None
    cache.check_integrity()
    assert [usage.pages_used for usage in cache.usage().values()] == [3, 1, 4]
    assert cache.view(without={0}).free_pages == {PoolId(0, 0): 5, PoolId(1, 0): 1, PoolId(2, 0): 9}
    assert cache.is_staged_in(0, {PoolId(1, 0)})
    cache.end_prefill(0)
    assert not cache.is_staged_in(0, {PoolId(1, 0)})
    assert [usage.pages_used for usage in cache.usage().values()] == [2, 0, 4]
    cache.check_integrity()


def test_pages_freed_before_they_are_announced_are_left_out() -> None:
    cache = manager(make_plan([[2]]), {0: 8})
    for slot in (0, 1):
        cache.admit(slot, Placement(owners=((0, 0),)), 1)
    cache.release(0)
    cache.admit(0, Placement(owners=((0, 0),)), 4)
    cache.check_integrity()
    written = [(lane, index) for lane, index, _ in entries_of(cache.take_deltas())[0, 0]]
    assert sorted(written) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0)]


def test_only_homes_and_workers_own_lanes() -> None:
    cache = manager(make_plan([[2, 1]], 1), {0: 9, 1: 9, 2: 9})
    with pytest.raises(AssertionError, match="group 0 of stage 0 cannot live on rank 1"):
        cache.admit(0, Placement(owners=((1, 0, 1),)), 1)


def test_check_integrity_finds_lost_doubled_and_miscounted_pages() -> None:
    def fresh() -> CacheManager:
        cache = manager(make_plan([[2]]), {0: 8})
        cache.admit(0, Placement(owners=((0, 0),)), 4)
        cache.check_integrity()
        return cache

    cache = fresh()
    cache._pools[PoolId(0, 0)].allocate(1)
    with pytest.raises(AssertionError, match="lost or owned twice"):
        cache.check_integrity()
    cache = fresh()
    cache._sequences[0].owned[0].blocks[0][0, 0] = cache._sequences[0].owned[0].blocks[0][0, 1]
    with pytest.raises(AssertionError, match="lost or owned twice"):
        cache.check_integrity()
    cache = fresh()
    cache._sequences[0].num_tokens = 7
    with pytest.raises(AssertionError, match="short of pages"):
        cache.check_integrity()
    cache = fresh()
    cache._num_lanes[PoolId(0, 0)] += 1
    with pytest.raises(AssertionError, match="miscounted"):
        cache.check_integrity()


class NaiveCache:
    """Counts pages copy by copy of every lane."""

    def __init__(self, plan: Plan, num_pages: dict[int, int]) -> None:
        self.plan, self.num_pages = plan, num_pages
        self.copies: dict[int, list[tuple[PoolId, int, bool]]] = {}  # slot -> (pool, lane, is staging)
        self.length: dict[int, int] = {}
        self.staged: dict[int, int] = {}  # slot -> length at admission

    def copies_of(self, slot: int, placement: Placement) -> list[tuple[PoolId, int, bool]]:
        copies = []
        for stage, owners in enumerate(placement.owners):
            for group, owner in enumerate(owners):
                lane, home = slot * len(owners) + group, self.plan.home_ranks[stage][group]
                copies.append((PoolId(owner, stage), lane, False))
                if owner != home:
                    copies.append((PoolId(home, stage), lane, True))
        return copies

    def used(self) -> Counter[PoolId]:
        return Counter(
            pool
            for slot in self.copies
            for pool, _, is_staging in self.copies[slot]
            for _ in range(self.pages(slot, is_staging))
        )

    def pages(self, slot: int, is_staging: bool) -> int:
        return -(-(self.staged if is_staging else self.length)[slot] // PAGE_SIZE)

    def missing(self) -> dict[PoolId, int]:
        """Pages beyond what there is."""
        return {pool: n - self.num_pages[pool.rank] for pool, n in self.used().items() if n > self.num_pages[pool.rank]}

    def attempt(self, slot: int, length: int, copies: list[tuple[PoolId, int, bool]]) -> dict[PoolId, int]:
        old = self.length.get(slot), self.copies.get(slot)
        self.length[slot], self.copies[slot] = length, copies
        missing = self.missing()
        if missing:
            self.length[slot], self.copies[slot] = old[0] or 0, old[1] or []
        return missing


@given(seed=st.integers(0, 2**32), groups=st.sampled_from([[[3]], [[2, 1]], [[1, 2], [3]]]), workers=st.integers(0, 2))
@settings(max_examples=120)
def test_random_operations_against_the_naive_cache(seed: int, groups: list[list[int]], workers: int) -> None:
    random = Random(seed)
    plan = make_plan(groups, workers)
    num_pages = {rank: random.randint(0, 30) for rank in plan.ranks}
    cache, naive = manager(plan, num_pages), NaiveCache(plan, num_pages)
    tables: dict[PoolId, dict[tuple[int, int], int]] = {}
    for _ in range(40):
        slot = random.randrange(4)
        if not naive.copies.get(slot):
            placement = random_placement(random, plan)
            length = naive.staged[slot] = random.randint(1, 12)
            expected = naive.attempt(slot, length, naive.copies_of(slot, placement))
            found = cache.admit(slot, placement, length)
            assert (found.missing if found else {}) == expected
        elif (what := random.random()) < 0.6:
            length = naive.length[slot] + random.choice([0, 1, 1, 1, 5])
            expected = naive.attempt(slot, length, naive.copies[slot])
            found = cache.allocate(slot, length)
            assert (found.missing if found else {}) == expected
        elif what < 0.8:
            cache.end_prefill(slot)
            naive.copies[slot] = [copy for copy in naive.copies[slot] if not copy[2]]
        else:
            cache.release(slot)
            naive.copies[slot] = []
        cache.check_integrity()
        used = naive.used()
        assert all(cache.free_pages(pool) == num_pages[pool.rank] - used[pool] for pool in pools_of(plan))
        if random.random() < 0.5:
            replay(cache.take_deltas(), tables)
            check_tables(naive, tables)
            for lanes in cache._sequences.values():
                for part in lanes.parts:
                    for lane, pages in zip(part.lane_U, part.pages, strict=True):
                        assert [tables[part.pool][lane, index] for index in range(len(pages))] == pages.tolist()


def random_placement(random: Random, plan: Plan) -> Placement:
    return Placement(
        owners=tuple(tuple(random.choice([home, *plan.worker_ranks]) for home in homes) for homes in plan.home_ranks)
    )


def check_tables(naive: NaiveCache, tables: dict[PoolId, dict[tuple[int, int], int]]) -> None:
    """Every entry of a live lane is a page of its pool, and no page is in two of them."""
    seen: dict[PoolId, list[int]] = {}
    for slot, copies in naive.copies.items():
        for pool, lane, is_staging in copies:
            pages = range(naive.pages(slot, is_staging))
            seen.setdefault(pool, []).extend(tables[pool][lane, index] for index in pages)
    for pool, pages in seen.items():
        assert len(set(pages)) == len(pages), f"a page of {pool} is in two lanes"
        assert all(0 <= page < naive.num_pages[pool.rank] for page in pages)
