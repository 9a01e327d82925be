"""Placement, rebalancing and following measurements with profiles at the bounds of what numbers may be."""

from random import Random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.core.placement import FleetView, Move, PoolId, pages_for
from hetis.core.profile import LEAST_US, AttentionProfile, DeviceProfile, FleetProfile, LinkProfile, TransferProfile
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.hetis_dispatcher import HetisDispatcher
from hetis.dispatcher.native import NativeSolver
from hetis.dispatcher.problem import makespan_us
from hetis.dispatcher.rebalance import MigrationBudget, Rebalancer
from hetis.dispatcher.residents import Resident
from hetis.dispatcher.room import shortage_of
from hetis.dispatcher.solver import Solver
from tests.dispatcher.fleets import KEY, check_fits, make_spec, make_view
from tests.dispatcher.small_problems import all_counts, check_counts, tiny_problem
from tests.scheduler.toy_engine import make_plan, make_sequence

AMOUNTS = (0.0, 0.0, LEAST_US, 1.0, 1e12)
PLAN = make_plan([[4]], 2)


def extreme_cost(rng: Random) -> CostModel:
    def attention() -> AttentionProfile:
        terms = [rng.choice(AMOUNTS) for _ in range(4)]
        terms[rng.randrange(4)] = rng.choice(AMOUNTS[2:])
        return AttentionProfile(us_per_head=terms[0], us_per_byte=terms[1], constant_us=terms[2], floor_us=terms[3])

    def way() -> TransferProfile:
        alpha, beta, large, more = (rng.choice(AMOUNTS) for _ in range(4))
        return TransferProfile(alpha_us=alpha, beta_us_per_byte=beta, large_bytes=large, more_us_per_byte=more)

    devices = {
        rank: DeviceProfile(key=KEY, attention=attention(), read_bytes_per_us=0.0, usable_bytes=0) for rank in range(3)
    }
    links = tuple(LinkProfile(primary=0, worker=worker, request=way(), reply=way()) for worker in (1, 2))
    cost = CostModel(FleetProfile(devices=devices, links=links), make_spec(4), "float32")
    cost.observe_dense(0, rng.choice(AMOUNTS))
    return cost


@given(st.integers(0, 1 << 30))
@settings(max_examples=100)
def test_extreme_profiles_are_no_obstacle(solver: Solver, seed: int) -> None:
    rng = Random(seed)
    cost, view = extreme_cost(rng), make_view(PLAN, [rng.choice((8, 400)) for _ in range(3)])
    for _ in range(10):
        for rank in range(3):
            cost.observe(rank, rng.choice((0, 2, 8)), rng.choice((0.0, 1e6)), rng.choice((0.0, 1.0, 1e9)))
        for worker in (1, 2):
            cost.observe_link(worker, rng.choice((0, 4)), rng.choice((0.0, 1.0, 1e9)))
    rule, rebalancer = HetisDispatcher(cost, solver), Rebalancer(cost, solver=solver)
    sequences = [make_sequence(index, rng.choice((4, 20)), 5) for index in range(3)]
    check_fits(view, rule.assign(sequences, view), sequences)
    [alone] = rule.assign(sequences[:1], view)
    assert (alone is None) == bool(rule.why_not(sequences[0], view))
    assert (alone is None) == (shortage_of(sequences[0], view) is not None), "an empty fleet lets none wait that fits"
    residents = [
        Resident(slot=slot, arrival=slot, num_tokens=8, owners=((rng.randrange(3),) * 4,)) for slot in range(3)
    ]
    outcome = rebalancer.compute(residents, view, MigrationBudget(1e9, 1e9))
    assert not outcome.preempt
    check_moves(outcome.moves, residents, view)
    lacking = {PoolId(0, 0): 4}
    relief = rebalancer.memory(residents, view, lacking)
    check_moves(relief.moves, residents, view)
    assert all(move.source == 0 for move in relief.moves)
    leaving = sum(pages_for(residents[move.slot].num_tokens, view.page_size) for move in relief.moves)
    assert leaving >= 4 or set(relief.exhausted) == set(lacking)


def check_moves(moves: list[Move], residents: list[Resident], view: FleetView) -> None:
    """Lanes leave where they are, none twice, and all together fit where they go."""
    free = dict(view.free_pages)
    assert len({(move.slot, move.stage, move.group) for move in moves}) == len(moves)
    for move in moves:
        resident = residents[move.slot]
        assert resident.owners[move.stage][move.group] == move.source != move.target
        free[PoolId(move.target, move.stage)] -= pages_for(resident.num_tokens, view.page_size)
    assert all(count >= min(0, view.free_pages[pool]) for pool, count in free.items())


@given(st.integers(0, 1 << 30))
@settings(max_examples=200)
def test_extreme_problems_are_solved(native_solver: NativeSolver, seed: int) -> None:
    """One sequence exactly, two within 2 % of the optimum."""
    rng = Random(seed)
    problem = tiny_problem(rng, rng.randint(1, 2), rng.randint(1, 3))
    scale = [rng.choice((LEAST_US, 1.0, 1e12)) for _ in range(problem.num_devices)]
    problem = msgspec.structs.replace(
        problem,
        start_us=[rng.choice((0.0, start, 1e12)) for start in problem.start_us],
        lane_us=[[factor * cost for cost in row] for factor, row in zip(scale, problem.lane_us, strict=True)],
    )
    every, counts = all_counts(problem), native_solver.solve(problem)
    assert (counts is None) == (not every)
    if counts is not None:
        check_counts(problem, counts)
        best_us = min(makespan_us(problem, other) for other in every)
        assert makespan_us(problem, counts) <= (1.0 if problem.num_sequences == 1 else 1.02) * best_us
