"""Page transfers of a cache alone: which pages when, and that none is lost or sent twice."""

from random import Random

import pytest

from hetis.cache.cache_manager import CacheManager
from hetis.cache.migration import Migrator
from hetis.core.messages.step_command import PageTransfer
from hetis.core.placement import Move, Placement, PoolId, pools_of
from tests.scheduler.toy_engine import make_plan

PAGE_SIZE = 4
PLAN = make_plan([[2, 1]], 2)  # homes 0 (groups 0, 1) and 1 (group 2), workers 2 and 3


def make(max_pages: int, num_pages: int = 40, num_tokens: int = 10) -> tuple[CacheManager, Migrator]:
    """One sequence in slot 0, past its prompt: lanes on ranks 0, 2, 1."""
    cache = CacheManager(PLAN, 3, dict.fromkeys(range(4), num_pages), PAGE_SIZE, 4)
    assert cache.admit(0, Placement(owners=((0, 2, 1),)), num_tokens) is None
    cache.end_prefill(0)
    return cache, Migrator(cache, PLAN, 3, PAGE_SIZE, 16, max_pages)


def move(group: int, source: int, target: int) -> Move:
    return Move(slot=0, stage=0, group=group, source=source, target=target)


def spans(transfers: list[PageTransfer]) -> list[tuple[int, int, int]]:
    return [(transfer.lane, transfer.first, transfer.stop) for transfer in transfers]


def test_a_lane_that_fits_is_sent_at_once_and_committed_with_the_next_command() -> None:
    cache, migrator = make(max_pages=3)
    assert migrator.start([move(0, 0, 3)]) == [move(0, 0, 3)]
    assert migrator.commit() == []
    assert migrator.plan({}) == [PageTransfer(0, 0, 0, 3, 0, 3)]
    assert cache.owners(0) == ((3, 2, 1),), "it counts at its target"
    assert migrator.commit() == [move(0, 0, 3)]
    assert not migrator.is_busy
    assert (migrator.num_committed, migrator.bytes_sent) == (1, 3 * PAGE_SIZE * 16)
    assert cache.free_pages(PoolId(0, 0)) == 40
    cache.check_integrity()


def test_only_full_pages_go_ahead_of_the_last_transfer() -> None:
    cache, migrator = make(max_pages=1)  # 10 tokens: two full pages and a half
    migrator.start([move(0, 0, 3)])
    assert spans(migrator.plan({})) == [(0, 0, 1)]
    assert cache.allocate(0, 13) is None  # a fourth page, at the target too
    assert spans(migrator.plan({})) == [(0, 1, 2)]
    assert migrator.commit() == []
    assert spans(migrator.plan({})) == [(0, 2, 3)]
    assert spans(migrator.plan({})) == [(0, 3, 4)], "what is left, with the token appended meanwhile"
    assert migrator.commit() == [move(0, 0, 3)]
    cache.check_integrity()


def test_links_are_shared_and_a_relay_takes_two() -> None:
    _, migrator = make(max_pages=2)
    migrator.start([move(1, 2, 3), move(0, 0, 3), move(2, 1, 3)])
    # the first fills 2 -> 0 and 0 -> 3, which the second needs, too; the third has another home
    assert spans(migrator.plan({})) == [(1, 0, 2), (2, 0, 2)]
    assert spans(migrator.plan({})) == [(1, 2, 3), (0, 0, 1), (2, 2, 3)]


def test_every_worker_has_a_limit_of_its_own() -> None:
    _, migrator = make(max_pages=2)
    migrator.start([move(0, 0, 3), move(2, 1, 2)])
    page = PAGE_SIZE * 16
    assert spans(migrator.plan({3: 0.5 * page})) == [(0, 0, 1), (2, 0, 2)], "a page goes in any case"
    assert spans(migrator.plan({3: 1.5 * page})) == [(0, 1, 2), (2, 2, 3)]


def test_a_migration_into_a_pool_can_be_cancelled_half_way() -> None:
    cache, migrator = make(max_pages=1)
    migrator.start([move(0, 0, 3), move(2, 1, 2)])
    migrator.plan({})
    assert cache.num_arriving(PoolId(3, 0)) == 3
    migrator.cancel_into({PoolId(3, 0)})
    cache.check_integrity()
    assert cache.owners(0) == ((0, 2, 2),)
    assert cache.free_pages(PoolId(3, 0)) == 40
    migrator.start([move(0, 0, 3)])
    assert spans(migrator.plan({})) == [(2, 1, 2), (0, 0, 1)], "it begins again"


def test_without_pages_at_the_target_nothing_starts() -> None:
    cache, migrator = make(max_pages=9, num_pages=6)
    assert migrator.start([move(0, 0, 2), move(2, 1, 2)]) == [move(0, 0, 2)]
    cache.check_integrity()


def test_the_migrations_of_a_sequence_that_leaves_end() -> None:
    cache, migrator = make(max_pages=1)
    migrator.start([move(0, 0, 3), move(1, 2, 0)])
    migrator.plan({})
    cache.release(0)
    assert (migrator.plan({}), migrator.commit(), migrator.is_busy) == ([], [], False)
    assert all(cache.free_pages(pool) == 40 for pool in pools_of(PLAN))
    cache.check_integrity()


def test_deltas_of_a_lane_that_has_left_are_not_sent() -> None:
    """Pages allocated at the source, which no command has named, are free again."""
    cache, migrator = make(max_pages=9)
    cache.take_deltas()
    migrator.start([move(0, 0, 3)])
    migrator.plan({})
    assert cache.allocate(0, 17) is None
    migrator.commit()
    counts = {pool.rank: len(entries.lane_E) for pool, entries in cache.take_deltas().items()}
    assert counts == {1: 2, 2: 2, 3: 5}
    cache.check_integrity()


@pytest.mark.parametrize("seed", range(20))
def test_every_page_is_sent_once_and_in_order(seed: int) -> None:
    random = Random(seed)
    cache, migrator = make(max_pages=random.randint(1, 3))
    moves = [move(0, 0, random.choice([2, 3])), move(1, 2, random.choice([0, 3])), move(2, 1, random.choice([2, 3]))]
    migrator.start(moves)
    seen: dict[int, int] = {}
    num_tokens = 10
    while migrator.is_busy:
        if random.random() < 0.5:
            num_tokens += 1
            assert cache.allocate(0, num_tokens) is None
        for transfer in migrator.plan({}):
            assert transfer.first == seen.get(transfer.lane, 0) < transfer.stop
            seen[transfer.lane] = transfer.stop
        for committed in migrator.commit():
            assert seen[committed.group] == -(-num_tokens // PAGE_SIZE)
        cache.check_integrity()
    assert cache.owners(0)[0] == tuple(each.target for each in moves)
