"""Dispatcher, balancer and migration on random fleets that are too small: every request is served, no page is lost."""

from random import Random

import pytest

from hetis.dispatcher.hetis_dispatcher import HetisDispatcher
from hetis.dispatcher.rebalance import Rebalancer
from hetis.engine.balancer import INTERVAL_SECONDS, Balancer
from hetis.engine.events import EventLog
from tests.dispatcher.fleets import device, make_cost
from tests.scheduler.toy_engine import ToyEngine, alone, churn, make_plan, make_sequence

GROUPS = [[4]], [[2, 1]], [[3], [2, 1]], [[2], [2]], [[1, 1]], [[0, 1]], [[2, 0], [0, 1, 1]]


class Soak:
    """One fleet whose devices become faster and slower, with time of its own."""

    def __init__(self, seed: int, depth: int) -> None:
        self.random = random = Random(seed)
        plan = make_plan(random.choice(GROUPS), random.randint(0, 3))
        self.devices = [device(random.choice((0.05, 0.5, 1, 1, 4))) for _ in plan.members]
        self.cost = make_cost(
            plan, self.devices, alpha_us=random.choice((0.0, 5.0)), dense_us=random.choice((0.0, 5.0, 50.0))
        )
        self.now = 0.0
        self.engine = ToyEngine(
            plan,
            {rank: plan.num_groups * random.choice((8, 20, 40)) for rank in plan.ranks},
            page_size=random.choice((1, 2, 4)),
            random=random,
            make_relief=self.make_balancer,
            max_transfer_pages=random.choice((1, 2, 8)),
            max_num_seqs=random.choice((4, 8, 16)),
            max_num_batched_tokens=random.choice((8, 32, 64)),
            dispatcher=HetisDispatcher(self.cost),
            depth=depth,
        )

    def make_balancer(self, engine: ToyEngine) -> Balancer:
        budget = self.random.choice((0, 50, 1e5, 1e9))
        self.balancer = Balancer(engine.cache, engine.migrator, Rebalancer(self.cost), budget, EventLog())
        return self.balancer

    def turn(self) -> None:
        engine, random = self.engine, self.random
        self.now += INTERVAL_SECONDS / 5
        engine.committed += engine.migrator.commit()
        self.balancer.balance(engine.scheduler.running, engine.scheduler.refused, self.now)
        if random.random() < 0.1:
            slowness = random.choice((1.0, 1.0, 3.0, 10.0))
            for rank, profile in enumerate(self.devices):
                for _ in range(4):  # one measurement counts for a factor of two at most
                    self.cost.observe(rank, 8, 1e4, slowness * profile.attention.time_us(8, 1e4))
        engine.step()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("seed", range(60))
def test_every_request_is_served_and_no_page_is_lost(seed: int, depth: int) -> None:
    soak = Soak(seed, depth)
    engine, random = soak.engine, soak.random
    context = engine.max_model_len
    assert context is not None
    arrivals = range(random.randint(4, 24))
    sequences = [make_sequence(a, random.randint(1, max(1, context // 3)), random.randint(1, 40)) for a in arrivals]
    expected = [alone(sequence, context) for sequence in sequences]
    aborted = churn(engine, sequences, random, soak.turn)
    for sequence, tokens in zip(sequences, expected, strict=True):
        assert sequence.id in aborted or sequence.token_ids == tokens


@pytest.mark.parametrize("depth", [0, 1])
def test_the_soak_reaches_all_that_it_is_for(depth: int) -> None:
    """Migrations for balance and for pages, steps without rows, preemptions, and cancelled migrations."""
    soaks = [Soak(seed, depth) for seed in range(12)]
    cancelled = 0
    for soak in soaks:
        cancel = soak.engine.cache.cancel

        def counted(transit, cancel=cancel):  # type: ignore[no-untyped-def]
            nonlocal cancelled
            cancelled += 1
            cancel(transit)

        soak.engine.cache.cancel = counted  # type: ignore[method-assign]
        for arrival in range(24):
            context = soak.engine.max_model_len
            assert context is not None
            soak.engine.scheduler.add(make_sequence(arrival, 1 + arrival % max(1, context // 3), 30))
        while soak.engine.has_work:
            soak.turn()
    assert sum(soak.balancer.num_rebalances for soak in soaks) > 0
    assert sum(soak.balancer.num_reliefs for soak in soaks) > 0
    assert sum(soak.engine.scheduler.num_preemptions for soak in soaks) > 0
    assert sum(not batch.rows for soak in soaks for batch in soak.engine.batches) > 0
    assert cancelled > 0
