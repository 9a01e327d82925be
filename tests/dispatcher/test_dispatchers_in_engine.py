"""Dispatchers under the scheduler: on small fleets that run out of pages all requests complete."""

from random import Random

import pytest

from hetis.core.placement import Dispatcher
from hetis.core.plan import Plan
from hetis.dispatcher.hetis_dispatcher import HetisDispatcher
from hetis.dispatcher.simple_dispatchers import EvenDispatcher, PrimaryOnlyDispatcher
from tests.dispatcher.fleets import device, make_cost
from tests.scheduler.toy_engine import ToyEngine, at_depths, make_plan, make_sequence

GROUPS = [[8]], [[5, 3]], [[3], [3]], [[2, 1], [1, 1, 1], [3]], [[0, 2, 0], [2]]
DISPATCHERS = "hetis", "hetis with a useless worker", "even", "primary-only"


def make_dispatcher(name: str, plan: Plan) -> Dispatcher:
    if name == "even":
        return EvenDispatcher()
    if name == "primary-only":
        return PrimaryOnlyDispatcher()
    useless = 1000.0 if "useless" in name else 1.0
    devices = [device(1.0 / (useless if plan.is_worker(rank) else 1)) for rank in plan.ranks]
    cost = make_cost(plan, devices, alpha_us=useless, dense_us=10.0, num_layers=len(plan.stages))
    return HetisDispatcher(cost)


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize(("groups", "depth"), at_depths(GROUPS), ids=str)
def test_all_requests_complete(name: str, groups: list[list[int]], depth: int) -> None:
    random = Random(f"{name} {groups}")
    plan = make_plan(groups, 2)
    biggest = max(max(counts) for counts in groups)
    num_pages = {rank: 30 if plan.is_worker(rank) else biggest * 7 for rank in plan.ranks}
    engine = ToyEngine(plan, num_pages, random=random, dispatcher=make_dispatcher(name, plan), depth=depth)
    sequences = [make_sequence(i, random.randint(1, 20), random.randint(1, 31)) for i in range(25)]
    engine.serve(sequences)
    owners = {owner for batch in engine.batches for _, placement in batch.admitted for owner in placement.owners[0]}
    assert owners.isdisjoint(plan.worker_ranks) == (name == "primary-only" or "useless" in name)
