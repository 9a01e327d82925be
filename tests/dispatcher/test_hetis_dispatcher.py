"""Dispatchers: their decisions in cases that can be decided by hand, and what holds in all."""

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.core.placement import Dispatcher, FleetView, Placement, PoolId, pools_of
from hetis.core.plan import Plan
from hetis.core.profile import AttentionProfile
from hetis.core.request import Sequence
from hetis.dispatcher.admission import Admission
from hetis.dispatcher.hetis_dispatcher import HetisDispatcher
from hetis.dispatcher.load import FleetLoad, stage_devices
from hetis.dispatcher.room import shortage_of
from hetis.dispatcher.simple_dispatchers import EvenDispatcher, PrimaryOnlyDispatcher
from hetis.dispatcher.solver import Solver, choose_solver
from tests.dispatcher.fleets import check_fits, device, make_cost, make_view
from tests.scheduler.toy_engine import make_plan, make_sequence

PLENTY = 10_000


def counts_of(placement: Placement | None, stage: int = 0) -> dict[int, int]:
    assert placement is not None
    owners = placement.owners[stage]
    return {rank: owners.count(rank) for rank in sorted(set(owners))}


def test_lanes_follow_speed() -> None:
    """A worker three times as fast gets three of four lanes."""
    plan = make_plan([[8]], 1)
    rule = HetisDispatcher(make_cost(plan, [device(), device(3.0)]))
    [placement] = rule.assign([make_sequence(0, 10, 50)], make_view(plan, [PLENTY, PLENTY]))
    assert counts_of(placement) == {0: 2, 1: 6}


def test_a_far_worker_stays_idle_until_it_pays() -> None:
    """Its link takes 20 us, a lane about 1 us: the first sequences stay at home, and so do all of few lanes."""
    plan = make_plan([[8]], 1)
    rule = HetisDispatcher(make_cost(plan, [device(), device()], alpha_us=20.0))
    placements = rule.assign([make_sequence(i, 1, 50) for i in range(6)], make_view(plan, [PLENTY, PLENTY]))
    away = [counts_of(placement).get(1, 0) for placement in placements]
    assert 0 < sum(away) < 24
    [alone] = rule.assign([make_sequence(0, 1, 50)], make_view(plan, [PLENTY, PLENTY]))
    assert counts_of(alone) == {0: 8}


def test_what_devices_hold_counts() -> None:
    plan = make_plan([[4]], 1)
    rule = HetisDispatcher(make_cost(plan, [device(), device()]))
    busy = make_view(plan, [PLENTY, PLENTY], {PoolId(0, 0): 8}, {PoolId(0, 0): 80})
    [placement] = rule.assign([make_sequence(0, 10, 50)], busy)
    assert counts_of(placement) == {1: 4}


def test_a_worker_works_for_all_stages() -> None:
    """Two like stages share one worker: it must not get half the lanes of each."""
    plan = make_plan([[24], [24]], 1)
    rule = HetisDispatcher(make_cost(plan, [device()] * 3, num_layers=2))
    [placement] = rule.assign([make_sequence(0, 10, 50)], make_view(plan, [PLENTY] * 4))
    away = [counts_of(placement, stage)[2] for stage in (0, 1)]
    assert 7 <= min(away) <= max(away) <= 9, "a third each, about"


def test_a_primary_without_head_groups_gets_no_lanes_and_has_its_share_of_the_rest() -> None:
    """What rank 0 needs for the LM head and sampling counts in every step, though it has no lanes."""
    plan = make_plan([[0, 4]], 1)
    cost = make_cost(plan, [device()] * 3, dense_us=1.0)
    view = make_view(plan, [PLENTY] * 2)
    [placement] = HetisDispatcher(cost).assign([make_sequence(0, 10, 50)], view)
    assert counts_of(placement) == {1: 2, 2: 2}
    load, [stage] = FleetLoad.of_view(view, cost), stage_devices(plan)
    assert (stage.pools, stage.num_homes, stage.most_lanes) == ((PoolId(1, 0), PoolId(2, 0)), 1, (4, 4))
    assert load.dense_us(stage) == pytest.approx(1.0)
    for _ in range(200):
        cost.observe_dense(0, 1.0, 50.0)
    assert load.dense_us(stage) == pytest.approx(51.0)


def test_a_stage_of_more_layers_weighs_more() -> None:
    """While the short stage computes a layer the worker does three of the long one, and has no time for the short."""
    even = make_plan([[12], [12]], 1)
    stages = [
        msgspec.structs.replace(even.stages[0], layers=(0, 3)),
        msgspec.structs.replace(even.stages[1], layers=(3, 4)),
    ]
    plan = msgspec.structs.replace(even, stages=tuple(stages))
    rule = HetisDispatcher(make_cost(plan, [device()] * 3, num_layers=4))
    [placement] = rule.assign([make_sequence(0, 10, 50)], make_view(plan, [PLENTY] * 4))
    assert counts_of(placement, 0) == {0: 6, 2: 6}
    assert counts_of(placement, 1) == {1: 12}


def test_a_home_keeps_pages_for_the_next_prompts() -> None:
    """The home is much faster but its memory is short: some lanes leave it room to compute another prompt."""
    plan = make_plan([[4]], 1)
    cost = make_cost(plan, [device(), device()])
    sequences = [make_sequence(i, 12, 100) for i in range(3)]  # 3 pages now, 4 later
    view = make_view(plan, [48, PLENTY], {PoolId(1, 0): 100}, {PoolId(1, 0): 1600})
    placements = HetisDispatcher(cost).assign(sequences, view)
    check_fits(view, placements, sequences)
    assert sum(counts_of(placement).get(0, 0) for placement in placements) <= (48 - 4 * 3) // 4


def test_waiting_is_better_than_crawling() -> None:
    """There is room only on a worker behind a link of 20 ms; one more sequence would slow eight down."""
    plan = make_plan([[4]], 1)
    rule = HetisDispatcher(make_cost(plan, [device(), device(0.05)], alpha_us=20_000.0, dense_us=100.0))
    # room at home for the prompt, not for growing
    crowded = make_view(plan, [16, PLENTY], {PoolId(0, 0): 32}, {PoolId(0, 0): 512})
    sequence = make_sequence(8, 16, 100)
    assert rule.assign([sequence], crowded) == [None]
    assert "so slow that a step would take" in rule.why_not(sequence, crowded)
    alone = make_view(plan, [16, PLENTY])
    [placement] = rule.assign([sequence], alone)
    assert counts_of(placement) == {1: 4}, "one sequence must run"
    assert rule.why_not(sequence, alone) == ""


def test_a_sequence_that_is_long_by_itself_does_not_wait() -> None:
    """It slows the others, but not because memory forces it where it is slow."""
    plan = make_plan([[4]], 1)
    rule = HetisDispatcher(make_cost(plan, [device(), device()]))
    view = make_view(plan, [PLENTY, PLENTY], {PoolId(0, 0): 8}, {PoolId(0, 0): 80})
    [placement] = rule.assign([make_sequence(2, 4000, 10)], view)
    assert placement is not None


def test_of_many_only_those_that_pay_are_taken() -> None:
    """An empty fleet, room at home for two sequences to grow; part of the third one would have to crawl."""
    plan = make_plan([[4]], 1)
    rule = HetisDispatcher(make_cost(plan, [device(), device(0.02)], alpha_us=20_000.0, dense_us=100.0))
    sequences = [make_sequence(i, 16, 100) for i in range(4)]
    placements = rule.assign(sequences, make_view(plan, [58, PLENTY]))
    assert [placement is not None for placement in placements] == [True, True, False, False]


def test_very_slow_workers_are_left_out_unless_there_are_many() -> None:
    """One that is 20 times slower brings less than it costs; thirty of them together are worth it."""
    for num_workers, is_used in ((1, False), (30, True)):
        plan = make_plan([[8]], num_workers)
        rule = HetisDispatcher(make_cost(plan, [device(), *[device(0.05)] * num_workers]))
        placements = rule.assign(
            [make_sequence(i, 20, 50) for i in range(8)], make_view(plan, [PLENTY] * (num_workers + 1))
        )
        away = sum(count for placement in placements for rank, count in counts_of(placement).items() if rank)
        assert (away > 0) == is_used


def test_a_very_slow_worker_is_better_than_nothing_if_attention_hardly_matters() -> None:
    """Memory needs it, and a step takes long for other reasons."""
    plan = make_plan([[4]], 1)
    crowded = make_view(plan, [16, PLENTY], {PoolId(0, 0): 32}, {PoolId(0, 0): 512})
    for dense_us, expected in ((10.0, None), (100_000.0, {1: 4})):
        rule = HetisDispatcher(make_cost(plan, [device(), device(0.05)], dense_us=dense_us))
        [placement] = rule.assign([make_sequence(8, 16, 100)], crowded)
        assert (None if placement is None else counts_of(placement)) == expected


def test_a_shortage_names_ranks_and_pages() -> None:
    plan = make_plan([[4]], 1)
    sequence = make_sequence(0, 16, 100)  # 4 pages now, 5 later
    assert shortage_of(sequence, make_view(plan, [20, 0])) is None
    assert shortage_of(sequence, make_view(plan, [16, 20])) is None
    assert str(shortage_of(sequence, make_view(plan, [17, 10]))) == "rank 0 lacks 1 page for stage 0"
    assert str(shortage_of(sequence, make_view(plan, [12, 1000]))) == "rank 0 lacks 4 pages for stage 0"
    assert str(shortage_of(sequence, make_view(plan, [-3, 0]))) == "rank 0 lacks 23 pages for stage 0"


def test_even_and_primary_only() -> None:
    plan = make_plan([[8]], 2)
    sequences = [make_sequence(i, 4, 100) for i in range(2)]
    view = make_view(plan, [PLENTY, PLENTY, 6])
    assert [counts_of(p) for p in EvenDispatcher().assign(sequences, view)] == [{0: 3, 1: 3, 2: 2}, {0: 4, 1: 3, 2: 1}]
    assert [counts_of(p) for p in PrimaryOnlyDispatcher().assign(sequences, view)] == [{0: 8}, {0: 8}]
    full = make_view(plan, [8, PLENTY, PLENTY])
    assert PrimaryOnlyDispatcher().assign(sequences, full) == [None, None]


def test_even_leaves_no_device_idle_beside_several_homes() -> None:
    plan = make_plan([[5, 3]], 5)
    [placement] = EvenDispatcher().assign([make_sequence(0, 4, 100)], make_view(plan, [PLENTY] * 7))
    assert counts_of(placement) == {0: 2, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}


def test_no_sequence_overtakes() -> None:
    plan = make_plan([[4]], 1)
    view = make_view(plan, [30, 0])
    sequences = [make_sequence(0, 100, 5), make_sequence(1, 4, 5)]
    for rule in (EvenDispatcher(), PrimaryOnlyDispatcher(), HetisDispatcher(make_cost(plan, [device()] * 2))):
        assert rule.assign(sequences, view) == [None, None]


def test_sequences_that_wait_do_not_change_the_time_of_a_step() -> None:
    """Memory forces two lanes of a short sequence onto each worker.

    The first worker is slow with long lanes, the second one with short ones: which is weak depends on what is placed.
    """
    plan = make_plan([[4]], 2)
    slow_with_bytes, slow_with_heads = (
        msgspec.structs.replace(
            device(), attention=AttentionProfile(us_per_head=a, us_per_byte=b / 512, constant_us=0.0)
        )
        for a, b in ((0.5, 0.05), (10.0, 0.01))
    )
    cost = make_cost(plan, [device(), slow_with_bytes, slow_with_heads])
    solver, view = choose_solver(), make_view(plan, [4, 4, 80])
    short, long = make_sequence(0, 4, 5), make_sequence(1, 300, 5)
    alone, followed = (Admission(cost, solver, waiting, view).decide(1) for waiting in ([short], [short, long]))
    assert alone.counts == [[[0], [2], [2]]]
    assert followed == alone


def random_case(rng: Random, solver: Solver) -> tuple[Plan, FleetView, list[Sequence], HetisDispatcher]:
    homes = [[3]], [[2, 1]], [[1, 1, 1]], [[4], [1, 3]], [[2], [2], [2]], [[1, 0, 0]], [[0, 2], [1, 0, 1]]
    plan = make_plan(rng.choice(homes), rng.randint(0, 3))
    devices = [
        device(rng.choice((0.1, 1, 1, 4)), rng.uniform(0, 9), rng.choice((0, 5))) for _ in range(plan.world_size)
    ]
    cost = make_cost(plan, devices, rng.choice((0.0, 30.0)), rng.uniform(0, 50), num_layers=len(plan.stages))
    pools = pools_of(plan)
    lanes = {pool: rng.choice((0, rng.randint(1, 9))) for pool in pools}
    tokens = {pool: count * rng.randint(1, 30) for pool, count in lanes.items()}
    view = make_view(plan, [rng.choice((rng.randint(-3, 9), rng.randint(0, 60), 500)) for _ in pools], lanes, tokens)
    sequences = [make_sequence(i, rng.randint(1, 25), rng.randint(1, 40)) for i in range(rng.randint(1, 5))]
    return plan, view, sequences, HetisDispatcher(cost, solver)


@given(st.integers(0, 1 << 30))
@settings(max_examples=250)
def test_all_dispatchers_keep_the_contract(solver: Solver, seed: int) -> None:
    _, view, sequences, hetis = random_case(Random(seed), solver)
    rules: list[Dispatcher] = [hetis, EvenDispatcher(), PrimaryOnlyDispatcher()]
    for rule in rules:
        placements = rule.assign(sequences, view)
        assert placements == rule.assign(sequences, view), "the same view gives the same placements"
        check_fits(view, placements, sequences)
        missing = [placement is None for placement in placements]
        assert missing == sorted(missing), "no sequence overtakes"


@given(st.integers(0, 1 << 30))
@settings(max_examples=100)
def test_a_sequence_that_fits_an_empty_fleet_is_placed(solver: Solver, seed: int) -> None:
    """No deadlock: when none is running, the first sequence is taken if there is any way."""
    plan, view, sequences, rule = random_case(Random(seed), solver)
    pages = [max(0, count) for count in view.free_pages.values()]
    [placement] = rule.assign(sequences[:1], make_view(plan, pages))
    assert (placement is None) == (shortage_of(sequences[0], make_view(plan, pages)) is not None)


def test_a_rank_without_profile_is_named() -> None:
    plan = make_plan([[2]], 1)
    cost = make_cost(plan, [device()])
    with pytest.raises(ValueError, match="rank 1 has no profile"):
        HetisDispatcher(cost).assign([make_sequence(0, 4, 4)], make_view(plan, [PLENTY] * 2))
