"""Whatever a profile may say, placing, rebalancing and following measurements go on."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.core.placement import FleetView, Move, PoolId, pages_for
from hetis.core.profile import LEAST_US, AttentionProfile, DeviceProfile, FleetProfile, LinkProfile, TransferProfile
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.rebalance import MigrationBudget, Rebalancer
from hetis.dispatcher.residents import Resident
from hetis.dispatcher.rules import HetisDispatcher
from tests.dispatcher.fleets import KEY, PAGE_SIZE, check_fits, make_spec, make_view
from tests.scheduler.toy_engine import make_plan, make_sequence

AMOUNTS = (0.0, 0.0, LEAST_US, 1.0, 1e12)
PLAN = make_plan([[4]], 2)


def extreme_cost(rng: Random) -> CostModel:
    def attention() -> AttentionProfile:
        terms = [rng.choice(AMOUNTS) for _ in range(4)]
        terms[rng.randrange(4)] = rng.choice(AMOUNTS[2:])
        return AttentionProfile(a_us_per_head=terms[0], b_us_per_byte=terms[1], c_us=terms[2], floor_us=terms[3])

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
def test_numbers_at_the_bounds_stop_nobody(seed: int) -> None:
    rng = Random(seed)
    cost, view = extreme_cost(rng), make_view(PLAN, [rng.choice((8, 400)) for _ in range(3)])
    for _ in range(10):
        for rank in range(3):
            cost.observe(rank, rng.choice((0, 2, 8)), rng.choice((0.0, 1e6)), rng.choice((0.0, 1.0, 1e9)))
        for worker in (1, 2):
            cost.observe_link(worker, rng.choice((0, 4)), rng.choice((0.0, 1.0, 1e9)))
    rule, rebalancer = HetisDispatcher(cost), Rebalancer(cost)
    sequences = [make_sequence(index, rng.choice((4, 20)), 5) for index in range(3)]
    placements = rule.assign(sequences, view)
    assert None not in placements or placements[placements.index(None) :] == [None] * placements.count(None), "in turn"
    check_fits(view, placements, sequences)
    if placements[0] is None:
        assert rule.why_not(sequences[0], view) != ""
    residents = [
        Resident(slot=slot, arrival=slot, num_tokens=8, owners=((rng.randrange(3),) * 4,)) for slot in range(3)
    ]
    outcome = rebalancer.compute(residents, view, MigrationBudget(1e9, 1e9))
    assert outcome.preempt == []
    check_moves(outcome.moves, residents, view)
    relieved = rebalancer.memory(residents, view, {PoolId(0, 0): 4})
    check_moves(relieved.moves, residents, view)
    assert all(move.source == 0 for move in relieved.moves)
    pages_off = sum(pages_for(residents[move.slot].num_tokens, PAGE_SIZE) for move in relieved.moves)
    assert relieved.exhausted == ([] if pages_off >= 4 else [PoolId(0, 0)])


def check_moves(moves: list[Move], residents: list[Resident], view: FleetView) -> None:
    """Each lane moves once, from where it lives, to pages that are free now."""
    free = dict(view.free_pages)
    assert len({(move.slot, move.stage, move.group) for move in moves}) == len(moves)
    for move in moves:
        moving = residents[move.slot]
        assert moving.owners[move.stage][move.group] == move.source != move.target
        free[PoolId(move.target, move.stage)] -= pages_for(moving.num_tokens, PAGE_SIZE) + 1
    assert all(free[PoolId(move.target, move.stage)] >= 0 for move in moves)
