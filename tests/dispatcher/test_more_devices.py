"""Another device never makes serving slower: random loads on random fleets, timed by the cost model.

The dispatcher decides by what is known when a sequence arrives, so a fleet with one device more takes another course
through the same load, with other sequences side by side. The solver's gap is proven for one placement
(`test_solver.py`), but nothing is for whole loads: a single one of 24 sequences may take up to 15 % longer by chance
(12 % was seen in 120), and loads must get shorter in the mean.
"""

from itertools import pairwise
from random import Random
from statistics import geometric_mean

import pytest

from hetis.core.batch import Batch
from hetis.core.profile import DeviceProfile
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.hetis_dispatcher import HetisDispatcher
from hetis.dispatcher.rebalance import Rebalancer
from hetis.engine.balancer import INTERVAL_SECONDS, Balancer
from hetis.engine.events import EventLog
from tests.dispatcher.fleets import device, make_cost
from tests.scheduler.toy_engine import ToyEngine, make_plan, make_sequence

GROUPS, QUERIES = 4, 2  # head groups, query heads of each
US_PER_PROMPT_TOKEN = 0.1
CONTEXT = 100
TOLERANCE = 0.15
SEEDS = range(4, 18)


class TimedEngine(ToyEngine):
    """Adds up the predicted time of its steps, in microseconds of one layer."""

    cost: CostModel
    time_us = 0.0

    def _send(self, batch: Batch) -> None:
        super()._send(batch)
        num_prompt_tokens = batch.num_tokens - batch.num_decode
        attention_us = max(self._attention_us(rank, batch) for rank in range(self.plan.world_size))
        self.time_us += self.cost.dense_us([0]) + US_PER_PROMPT_TOKEN * num_prompt_tokens + attention_us

    def _attention_us(self, rank: int, batch: Batch) -> float:
        heads, kv_bytes = 0, 0.0
        for row in batch.rows:
            if row.is_decode:
                lanes = self.cache.owners(row.sequence.slot)[0].count(rank)
                heads += QUERIES * lanes
                kv_bytes += lanes * self.cost.kv_bytes(row.start + 1)
        link_us = self.cost.link_us(rank, heads) if rank else 0.0
        return self.cost.attention_us(rank, heads, kv_bytes) + link_us


def load_us(devices: list[DeviceProfile], pages: list[int], alpha_us: float, seed: int, *, moves: bool) -> float:
    """Time of one random load. The first device is the home, the others are workers."""
    random, plan = Random(seed), make_plan([[GROUPS]], len(devices) - 1)
    cost = make_cost(plan, devices, alpha_us=alpha_us, dense_us=20.0)
    now = 0.0

    def balancer(engine: ToyEngine) -> Balancer | None:
        return Balancer(engine.cache, engine.migrator, Rebalancer(cost), 1e9, EventLog()) if moves else None

    engine = TimedEngine(
        plan,
        dict(enumerate(pages)),
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_model_len=CONTEXT,
        dispatcher=HetisDispatcher(cost),
        make_relief=balancer,
    )
    engine.cost = cost
    for arrival in range(24):
        engine.scheduler.add(make_sequence(arrival, random.randint(1, 40), random.randint(5, 50)))
    while engine.has_work:
        now += INTERVAL_SECONDS / 4
        if isinstance(engine.relief, Balancer):
            engine.committed += engine.migrator.commit()
            engine.relief.balance(engine.scheduler.running, engine.scheduler.refused, now)
        engine.step()
    engine.check_idle()
    return engine.time_us


@pytest.mark.parametrize("moves", [False, True])
def test_another_worker_never_makes_serving_slower(moves: bool) -> None:
    ratios = []
    for seed in SEEDS:
        random = Random(seed)
        devices = [device()] + [device(random.choice((0.02, 0.1, 0.3, 1, 3))) for _ in range(3)]
        pages = [GROUPS * random.choice((26, 60, 150))] + [GROUPS * random.choice((3, 26, 100)) for _ in range(3)]
        alpha_us = random.choice((0.0, 3.0, 30.0))
        times_us = [load_us(devices[:n], pages[:n], alpha_us, seed, moves=moves) for n in range(1, len(devices) + 1)]
        ratios += [after / before for before, after in pairwise(times_us)]
    assert max(ratios) <= 1 + TOLERANCE
    assert geometric_mean(ratios) < 0.95
    assert sum(ratio < 0.9 for ratio in ratios) > len(SEEDS) // 2, "workers must be of use, or nothing is shown"
