"""Each rule under the scheduler: all requests complete on small fleets that run out of pages, and none is stuck."""

from random import Random

import pytest

from hetis.core.placement import Dispatcher
from hetis.core.plan import Plan
from hetis.dispatcher.rules import EvenDispatcher, HetisDispatcher, PrimaryOnlyDispatcher
from tests.dispatcher.fleets import device, make_cost
from tests.scheduler.toy_engine import ToyEngine, make_plan, make_sequence

RULES = "hetis", "hetis with a useless worker", "even", "primary-only"


def make_rule(name: str, plan: Plan) -> Dispatcher:
    if name == "even":
        return EvenDispatcher()
    if name == "primary-only":
        return PrimaryOnlyDispatcher()
    useless = 1000.0 if "useless" in name else 1.0
    devices = [device(1.0 / (useless if plan.is_worker(rank) else 1)) for rank in plan.ranks]
    cost = make_cost(plan, devices, alpha_us=useless, dense_us=10.0, num_layers=len(plan.stages))
    return HetisDispatcher(cost)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", [[[8]], [[5, 3]], [[3], [3]], [[2, 1], [1, 1, 1], [3]], [[0, 2, 0], [2]]], ids=str)
def test_all_requests_complete(rule: str, groups: list[list[int]]) -> None:
    random = Random(f"{rule} {groups}")
    plan = make_plan(groups, 2)
    biggest = max(max(counts) for counts in groups)
    num_pages = {rank: 30 if plan.is_worker(rank) else biggest * 7 for rank in plan.ranks}
    engine = ToyEngine(plan, num_pages, random=random, dispatcher=make_rule(rule, plan))
    sequences = [make_sequence(i, random.randint(1, 20), random.randint(1, 31)) for i in range(25)]
    engine.serve(sequences)
    owners = {owner for batch in engine.batches for _, placement in batch.admitted for owner in placement.owners[0]}
    assert owners.isdisjoint(plan.worker_ranks) == (rule == "primary-only" or "useless" in rule)
