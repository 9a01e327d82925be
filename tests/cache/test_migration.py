"""Hauls on a cache alone: what travels when, and that nothing is lost or sent twice."""

from random import Random

import pytest

from hetis.cache.cache_manager import CacheManager
from hetis.cache.migration import Hauler
from hetis.core.messages.step_command import PageTransfer
from hetis.core.placement import Move, Placement, PoolId, pools_of
from tests.scheduler.toy_engine import make_plan

PAGE_SIZE = 4
PLAN = make_plan([[2, 1]], 2)  # homes 0 (groups 0, 1) and 1 (group 2), workers 2 and 3


def make(pages_per_haul: int, num_pages: int = 40, num_tokens: int = 10) -> tuple[CacheManager, Hauler]:
    """One sequence in slot 0, past its prompt: lanes on ranks 0, 2, 1."""
    cache = CacheManager(PLAN, 3, dict.fromkeys(range(4), num_pages), PAGE_SIZE, 4)
    assert cache.admit(0, Placement(owners=((0, 2, 1),)), num_tokens) is None
    cache.end_prefill(0)
    return cache, Hauler(cache, PLAN, 3, PAGE_SIZE, 16, pages_per_haul)


def move(group: int, source: int, target: int) -> Move:
    return Move(slot=0, stage=0, group=group, source=source, target=target)


def spans(hauls: list[PageTransfer]) -> list[tuple[int, int, int]]:
    return [(haul.lane, haul.first, haul.stop) for haul in hauls]


def test_a_lane_that_fits_goes_at_once_and_lands_with_the_next_command() -> None:
    cache, hauler = make(pages_per_haul=3)
    assert hauler.start([move(0, 0, 3)]) == [move(0, 0, 3)]
    assert hauler.land() == []
    assert hauler.plan({}) == [PageTransfer(0, 0, 0, 3, 0, 3)]
    assert cache.owners(0) == ((3, 2, 1),), "it counts where it goes"
    assert hauler.land() == [move(0, 0, 3)]
    assert not hauler.is_busy
    assert (hauler.num_landed, hauler.bytes_sent) == (1, 3 * PAGE_SIZE * 16)
    assert cache.free_pages(PoolId(0, 0)) == 40
    cache.check_integrity()


def test_only_full_pages_go_ahead_of_the_last_haul() -> None:
    cache, hauler = make(pages_per_haul=1)  # 10 tokens: two full pages and a half
    hauler.start([move(0, 0, 3)])
    assert spans(hauler.plan({})) == [(0, 0, 1)]
    assert cache.allocate(0, 13) is None  # a fourth page, at the target too
    assert spans(hauler.plan({})) == [(0, 1, 2)]
    assert hauler.land() == []
    assert spans(hauler.plan({})) == [(0, 2, 3)]
    assert spans(hauler.plan({})) == [(0, 3, 4)], "what is left, with the token appended meanwhile"
    assert hauler.land() == [move(0, 0, 3)]
    cache.check_integrity()


def test_links_are_shared_and_a_relay_takes_two() -> None:
    _, hauler = make(pages_per_haul=2)
    hauler.start([move(1, 2, 3), move(0, 0, 3), move(2, 1, 3)])
    # the first takes 2 -> 0 and 0 -> 3, on which nothing is left for the second; the third has a home of its own
    assert spans(hauler.plan({})) == [(1, 0, 2), (2, 0, 2)]
    assert spans(hauler.plan({})) == [(1, 2, 3), (0, 0, 1), (2, 2, 3)]


def test_every_link_has_a_pace_of_its_own() -> None:
    _, hauler = make(pages_per_haul=2)
    hauler.start([move(0, 0, 3), move(2, 1, 2)])
    page = PAGE_SIZE * 16
    assert spans(hauler.plan({3: 0.5 * page})) == [(0, 0, 1), (2, 0, 2)], "a page goes in any case"
    assert spans(hauler.plan({3: 1.5 * page})) == [(0, 1, 2), (2, 2, 3)]


def test_a_move_into_a_pool_can_be_forgotten_half_way() -> None:
    cache, hauler = make(pages_per_haul=1)
    hauler.start([move(0, 0, 3), move(2, 1, 2)])
    hauler.plan({})
    assert cache.num_arriving(PoolId(3, 0)) == 3
    hauler.cancel_into({PoolId(3, 0)})
    cache.check_integrity()
    assert cache.owners(0) == ((0, 2, 2),)
    assert cache.free_pages(PoolId(3, 0)) == 40
    hauler.start([move(0, 0, 3)])
    assert spans(hauler.plan({})) == [(2, 1, 2), (0, 0, 1)], "and begins anew"


def test_without_pages_at_the_target_nothing_starts() -> None:
    cache, hauler = make(pages_per_haul=9, num_pages=6)
    assert hauler.start([move(0, 0, 2), move(2, 1, 2)]) == [move(0, 0, 2)]
    cache.check_integrity()


def test_a_sequence_that_leaves_takes_its_moves_with_it() -> None:
    cache, hauler = make(pages_per_haul=1)
    hauler.start([move(0, 0, 3), move(1, 2, 0)])
    hauler.plan({})
    cache.release(0)
    assert (hauler.plan({}), hauler.land(), hauler.is_busy) == ([], [], False)
    assert all(cache.free_pages(pool) == 40 for pool in pools_of(PLAN))
    cache.check_integrity()


def test_deltas_of_a_lane_that_has_left_are_not_announced() -> None:
    """Pages reserved at the source, of which no command has told, are free again."""
    cache, hauler = make(pages_per_haul=9)
    cache.take_deltas()
    hauler.start([move(0, 0, 3)])
    hauler.plan({})
    assert cache.allocate(0, 17) is None
    hauler.land()
    counts = {pool.rank: len(entries.lane_E) for pool, entries in cache.take_deltas().items()}
    assert counts == {1: 2, 2: 2, 3: 5}
    cache.check_integrity()


@pytest.mark.parametrize("seed", range(20))
def test_every_page_travels_once_and_in_order(seed: int) -> None:
    random = Random(seed)
    cache, hauler = make(pages_per_haul=random.randint(1, 3))
    moves = [move(0, 0, random.choice([2, 3])), move(1, 2, random.choice([0, 3])), move(2, 1, random.choice([2, 3]))]
    hauler.start(moves)
    seen: dict[int, int] = {}
    num_tokens = 10
    while hauler.is_busy:
        if random.random() < 0.5:
            num_tokens += 1
            assert cache.allocate(0, num_tokens) is None
        for haul in hauler.plan({}):
            assert haul.first == seen.get(haul.lane, 0) < haul.stop
            seen[haul.lane] = haul.stop
        for landed in hauler.land():
            assert seen[landed.group] == -(-num_tokens // PAGE_SIZE)
        cache.check_integrity()
    assert cache.owners(0)[0] == tuple(each.target for each in moves)
