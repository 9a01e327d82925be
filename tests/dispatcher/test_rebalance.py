"""Which lanes move: for balance, for memory, within the budget, and in fleets that change."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.core.placement import FleetView, Move, PoolId, pages_for, pools_of
from hetis.core.plan import Plan
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.rebalance import THRESHOLD, MigrationBudget, Outcome, Rebalancer, Relieved
from hetis.dispatcher.residents import Resident, Residents
from hetis.dispatcher.solver import Solver, choose_solver
from tests.dispatcher.fleets import PAGE_SIZE, device, make_cost, make_view
from tests.scheduler.toy_engine import make_plan

PLENTY = 10_000


def resident(slot: int, owners: list[int], num_tokens: int = 8, **fields: object) -> Resident:
    """Of one stage."""
    return Resident(slot=slot, arrival=slot, num_tokens=num_tokens, owners=(tuple(owners),), **fields)


def ample() -> MigrationBudget:
    return MigrationBudget(1e12, 1e12)


def after(residents: list[Resident], moves: list[Move]) -> list[Resident]:
    """Residents when all moves are committed."""
    owners = {r.slot: [list(ranks) for ranks in r.owners] for r in residents}
    for move in moves:
        assert owners[move.slot][move.stage][move.group] == move.source
        owners[move.slot][move.stage][move.group] = move.target
    return [
        Resident(
            slot=r.slot,
            arrival=r.arrival,
            num_tokens=r.num_tokens,
            owners=tuple(map(tuple, owners[r.slot])),
            movable=r.movable,
        )
        for r in residents
    ]


def above_bound(cost: CostModel, residents: list[Resident], view: FleetView) -> float:
    """(makespan - bound) / bound, of the first stage."""
    fleet = Residents(cost, residents, view)
    makespan_us = fleet.load.makespan_us(fleet.stages[0].pools)
    return makespan_us / choose_solver().lower_bound_us(fleet.pooled(fleet.stages[0]), makespan_us) - 1


def one_home_two_workers() -> tuple[Plan, FleetView]:
    plan = make_plan([[4]], 2)
    return plan, make_view(plan, [PLENTY] * 3)


def test_a_balanced_fleet_is_left_alone() -> None:
    plan, view = one_home_two_workers()
    cost = make_cost(plan, [device()] * 3)
    residents = [resident(0, [0, 0, 1, 2]), resident(1, [0, 1, 2, 1]), resident(2, [0, 2, 1, 2])]
    assert Rebalancer(cost).compute(residents, view, ample()) == Outcome([], [])


def test_a_little_out_of_balance_is_left_alone() -> None:
    """5 : 4 : 3 is a quarter above the bound."""
    plan, view = one_home_two_workers()
    cost = make_cost(plan, [device()] * 3)
    residents = [resident(0, [0, 0, 1, 2]), resident(1, [0, 0, 1, 2]), resident(2, [0, 1, 1, 2])]
    assert 0.2 < above_bound(cost, residents, view) < THRESHOLD
    assert Rebalancer(cost).compute(residents, view, ample()).moves == []


def test_the_slowest_device_is_relieved_until_the_fleet_is_balanced() -> None:
    plan, view = one_home_two_workers()
    cost = make_cost(plan, [device()] * 3)
    residents = [resident(slot, [0, 0, 0, 0]) for slot in range(6)]
    outcome = Rebalancer(cost).compute(residents, view, ample())
    assert outcome.preempt == []
    assert {move.source for move in outcome.moves} == {0}
    assert above_bound(cost, after(residents, outcome.moves), view) <= THRESHOLD / 2
    again = Rebalancer(cost).compute(after(residents, outcome.moves), view, ample())
    assert again.moves == [], "and stays so"


def test_the_biggest_contributor_goes_first_and_lanes_not_in_the_way_stay() -> None:
    plan, view = one_home_two_workers()
    cost = make_cost(plan, [device()] * 3)
    residents = [resident(0, [0, 0, 0, 0], 8), resident(1, [0, 0, 0, 1], 900), resident(2, [0, 0, 0, 0], 8)]
    moves = Rebalancer(cost).compute(residents, view, ample()).moves
    assert moves[0].slot == 1
    assert all(move.group != 3 for move in moves if move.slot == 1)


def test_a_device_that_slows_down_loses_lanes() -> None:
    plan, view = one_home_two_workers()
    cost = make_cost(plan, [device()] * 3)
    residents = [resident(slot, [0, 0, 1, 2]) for slot in range(6)]
    heads, kv_bytes = 6 * 2, 6 * 8 * 512
    for _ in range(60):
        cost.observe(2, heads, kv_bytes, 4 * (heads * 0.5 + kv_bytes * 0.01 / 512))
    moves = Rebalancer(cost).compute(residents, view, ample()).moves
    assert moves
    assert {move.source for move in moves} == {2}


def test_budget_bounds_what_moves_and_lets_it_go_on_later() -> None:
    plan, view = one_home_two_workers()
    cost = make_cost(plan, [device()] * 3)
    residents = [resident(slot, [0, 0, 0, 0], 8) for slot in range(6)]
    rebalancer, lane = Rebalancer(cost), 8 * 512
    budget = MigrationBudget(bytes_per_second=2 * lane, burst_bytes=3 * lane)
    first = rebalancer.compute(residents, view, budget).moves
    assert len(first) == 3
    residents = after(residents, first)
    assert rebalancer.compute(residents, view, budget).moves == []
    total = len(first)
    for _ in range(20):
        budget.refill(1.0)
        moves = rebalancer.compute(residents, view, budget).moves
        assert len(moves) <= 3
        residents, total = after(residents, moves), total + len(moves)
    assert above_bound(cost, residents, view) <= THRESHOLD / 2
    assert total <= 20


def test_a_lane_larger_than_the_burst_moves_too() -> None:
    plan, view = one_home_two_workers()
    cost = make_cost(plan, [device()] * 3)
    residents = [resident(0, [0, 0, 0, 0], 800)]
    budget = MigrationBudget(bytes_per_second=512, burst_bytes=1000)
    assert len(Rebalancer(cost).compute(residents, view, budget).moves) == 1
    assert budget.left_bytes < 0


def test_lanes_that_cannot_move_stay() -> None:
    plan, view = one_home_two_workers()
    cost = make_cost(plan, [device()] * 3)
    residents = [resident(slot, [0, 0, 0, 0], movable=slot == 3) for slot in range(6)]
    assert {move.slot for move in Rebalancer(cost).compute(residents, view, ample()).moves} == {3}
    full = make_view(plan, [0, 0, 0])
    assert Rebalancer(cost).compute(residents, full, ample()).moves == []


def test_lanes_go_home_to_their_own_home_only() -> None:
    plan = make_plan([[2, 2]], 1)
    view = make_view(plan, [PLENTY] * 3)
    cost = make_cost(plan, [device(4.0), device(), device(0.01)])
    residents = [resident(slot, [2, 2, 2, 2]) for slot in range(3)]
    moves = Rebalancer(cost).compute(residents, view, ample()).moves
    assert all(move.target == (0 if move.group < 2 else 1) for move in moves)
    assert len(moves) == 12, "no lane stays"


def test_no_lane_moves_to_make_the_next_bottleneck() -> None:
    """The long lane would make the idle worker nearly as slow as the home is now; the short one goes instead."""
    plan = make_plan([[1]], 1)
    cost = make_cost(plan, [device(), device()])
    residents = [resident(0, [0], 850), resident(1, [0], 1)]
    moves = Rebalancer(cost).compute(residents, make_view(plan, [PLENTY] * 2), ample()).moves
    assert moves == [Move(slot=1, stage=0, group=0, source=0, target=1)]


def test_homes_keep_pages_for_prompts() -> None:
    plan = make_plan([[4]], 1)
    cost = make_cost(plan, [device(4.0), device()])
    residents = [resident(slot, [1, 1, 1, 1]) for slot in range(6)]
    view = make_view(plan, [40, PLENTY])
    eager = Rebalancer(cost).compute(residents, view, ample()).moves
    careful = Rebalancer(cost).compute(residents, view, ample(), staging_tokens=8).moves
    assert (len(eager), len(careful)) == (13, 10), "3 pages a lane; 8 of 40 are kept, 10 at most"


# --- memory -----------------------------------------------------------------------------------------------------------


def test_pages_are_found_where_the_latest_arrival_with_lanes_there_can_go() -> None:
    """Sequence 3 came last but has nothing on rank 1; sequence 2 moves as many lanes as are needed, no more."""
    plan = make_plan([[4]], 2)
    cost = make_cost(plan, [device()] * 3)
    view = make_view(plan, [0, 0, PLENTY])
    residents = [resident(slot, [1, 1, 1, 1]) for slot in range(3)] + [resident(3, [0, 0, 2, 2])]
    outcome = Rebalancer(cost).memory(residents, view, {PoolId(1, 0): 3})
    assert outcome.exhausted == []
    assert [(move.slot, move.source, move.target) for move in outcome.moves] == [(2, 1, 2), (2, 1, 2)]


def test_a_home_can_be_freed_for_the_next_prompt() -> None:
    plan = make_plan([[4]], 1)
    cost = make_cost(plan, [device(), device()])
    residents = [resident(slot, [0, 0, 0, 0]) for slot in range(4)]
    outcome = Rebalancer(cost).memory(residents, make_view(plan, [0, PLENTY]), {PoolId(0, 0): 12})
    assert {move.target for move in outcome.moves} == {1}
    assert len(outcome.moves) == 6, "two pages each"


def test_a_full_fleet_is_exhausted() -> None:
    plan = make_plan([[4]], 2)
    cost = make_cost(plan, [device()] * 3)
    residents = [resident(slot, [1, 1, 1, 1]) for slot in range(3)] + [resident(3, [0, 0, 2, 2])]
    outcome = Rebalancer(cost).memory(residents, make_view(plan, [0, 0, 2]), {PoolId(1, 0): 3})
    assert outcome == Relieved([], [PoolId(1, 0)])


@pytest.mark.parametrize(("speed", "missing", "moves"), [(0.25, 4, 2), (0.25, 8, 0), (0.01, 1, 0)])
def test_a_move_that_would_cost_more_than_it_brings_is_left_out(speed: float, missing: int, moves: int) -> None:
    """Two lanes on a worker four times as slow do not show, four would; and one 100 times as slow gets nothing."""
    plan = make_plan([[4]], 1)
    cost = make_cost(plan, [device(), device(speed)])
    residents = [resident(slot, [0, 0, 0, 0]) for slot in range(3)]
    outcome = Rebalancer(cost).memory(residents, make_view(plan, [0, PLENTY]), {PoolId(0, 0): missing})
    assert len(outcome.moves) == moves
    assert outcome.exhausted == ([] if moves else [PoolId(0, 0)])


def test_a_weak_worker_is_better_than_preemption() -> None:
    """It brings too little for balance, but it has pages, and one lane there does not show."""
    plan = make_plan([[4]], 2)
    cost = make_cost(plan, [device(), device(0.05), device()], dense_us=200.0)
    residents = [resident(slot, [0, 0, 0, 0]) for slot in range(3)]
    missing = {PoolId(0, 0): 1}
    rebalancer = Rebalancer(cost)
    assert {move.target for move in rebalancer.memory(residents, make_view(plan, [0, 9, 9]), missing).moves} == {2}
    assert {move.target for move in rebalancer.memory(residents, make_view(plan, [0, 9, 0]), missing).moves} == {1}


# --- fleets that change -----------------------------------------------------------------------------------------------


def test_a_device_that_leaves_loses_all_its_lanes() -> None:
    cost = make_cost(make_plan([[4]], 2), [device()] * 3)
    plan = make_plan([[4]], 1)
    residents = [resident(slot, [0, 1, 2, 2]) for slot in range(3)]
    outcome = Rebalancer(cost).compute(residents, make_view(plan, [PLENTY] * 2), MigrationBudget(0.0, 0.0))
    assert outcome.preempt == []
    assert all(2 not in r.owners[0] for r in after(residents, outcome.moves))


def test_a_sequence_whose_lanes_find_no_pages_is_preempted() -> None:
    cost = make_cost(make_plan([[4]], 2), [device()] * 3)
    plan = make_plan([[4]], 1)
    residents = [resident(0, [0, 0, 2, 2]), resident(1, [2, 2, 2, 2]), resident(2, [0, 0, 0, 2], movable=False)]
    view = make_view(plan, [4, 5])  # a lane takes 2 pages and one to grow
    outcome = Rebalancer(cost).compute(residents, view, MigrationBudget(0.0, 0.0))
    assert {move.slot for move in outcome.moves} == {0}
    assert outcome.preempt == [1, 2]


def test_a_device_that_joins_gets_lanes() -> None:
    plan = make_plan([[4]], 2)
    cost = make_cost(make_plan([[4]], 1), [device()] * 2)
    residents = [resident(slot, [0, 0, 1, 1]) for slot in range(6)]
    cost.add(2, device(8.0))
    outcome = Rebalancer(cost).compute(residents, make_view(plan, [PLENTY] * 3), ample())
    assert {move.target for move in outcome.moves} == {2}


# --- always -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 30))
@settings(max_examples=150)
def test_moves_fit_are_possible_and_come_to_an_end(solver: Solver, seed: int) -> None:
    """Lanes move to pages that are free now, and a steady fleet soon has nothing more to move."""
    rng = Random(seed)
    plan = make_plan(rng.choice([[[3]], [[2, 1]], [[2], [1, 1]], [[0, 1]], [[2, 0], [0, 1, 1]]]), rng.randint(1, 3))
    workers = plan.worker_ranks
    devices = [
        device(rng.choice((0.1, 1, 1, 4)), rng.uniform(0, 3), rng.choice((0, 5))) for _ in range(plan.world_size)
    ]
    cost = make_cost(plan, devices, rng.choice((0.0, 5.0)), num_layers=len(plan.stages))
    homes = plan.home_ranks
    residents = [
        Resident(
            slot=slot,
            arrival=slot,
            num_tokens=rng.randint(1, 60),
            owners=tuple(tuple(rng.choice([home, *workers]) for home in stage) for stage in homes),
            movable=rng.random() < 0.9,
        )
        for slot in range(rng.randint(0, 8))
    ]
    free = {pool: rng.choice((rng.randint(0, 30), 1000)) for pool in pools_of(plan)}
    rebalancer = Rebalancer(cost, solver=solver)
    for _ in range(6):
        view = make_view(plan, list(free.values()))
        outcome = rebalancer.compute(residents, view, ample())
        assert outcome.preempt == []
        for move in outcome.moves:
            moving = next(r for r in residents if r.slot == move.slot)
            assert moving.movable
            assert move.target in (homes[move.stage][move.group], *workers)
            pages = pages_for(moving.num_tokens, PAGE_SIZE) + 1
            free[PoolId(move.target, move.stage)] -= pages
            assert free[PoolId(move.target, move.stage)] >= 0
        for move in outcome.moves:  # pages at the source come free when a migration is committed
            moving = next(r for r in residents if r.slot == move.slot)
            free[PoolId(move.source, move.stage)] += pages_for(moving.num_tokens, PAGE_SIZE) + 1
        residents = after(residents, outcome.moves)
    assert outcome.moves == []


@pytest.mark.parametrize("num_residents", [0, 1])
def test_no_resident_and_one(num_residents: int) -> None:
    plan, view = one_home_two_workers()
    rebalancer = Rebalancer(make_cost(plan, [device()] * 3))
    residents = [resident(0, [0, 1, 2, 0])][:num_residents]
    assert rebalancer.compute(residents, view, ample()).preempt == []
    assert rebalancer.memory(residents, view, {}) == Relieved([], [])
