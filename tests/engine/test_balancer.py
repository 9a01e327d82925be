"""The balancer between policy and migration: when it checks the balance, what it may move, and what it leaves alone."""

from collections.abc import Mapping, Sequence
from random import Random

from hetis.core.placement import Move, PoolId
from hetis.dispatcher.rebalance import MigrationBudget, Outcome, Rebalancer
from hetis.dispatcher.residents import Resident
from hetis.dispatcher.simple_dispatchers import PrimaryOnlyDispatcher
from hetis.engine.balancer import INTERVAL_SECONDS, Balancer
from hetis.engine.events import EventLog
from tests.dispatcher.fleets import device, make_cost
from tests.scheduler.toy_engine import ToyEngine, make_plan, make_sequence


class Spy(Rebalancer):
    """Keeps what it was asked, and moves nothing."""

    calls: list[Sequence[Resident]]

    def compute(  # type: ignore[override]
        self, residents: Sequence[Resident], view: object, budget: MigrationBudget, staging_tokens: int = 0
    ) -> Outcome:
        self.calls.append(residents)
        return Outcome([], [])


def make_engine(num_pages: dict[int, int], **options: object) -> ToyEngine:
    """One home of 4 groups and two workers, all alike; lanes are placed in proportion to free pages."""
    plan = make_plan([[4]], 2)
    cost = make_cost(plan, [device()] * 3, dense_us=10.0)

    def relief(engine: ToyEngine) -> Balancer:
        return Balancer(engine.cache, engine.migrator, Rebalancer(cost), 1e9, EventLog())

    return ToyEngine(plan, num_pages, random=Random(0), make_relief=relief, **options)  # type: ignore[arg-type]


def test_requests_complete_without_preemption_where_lanes_make_room() -> None:
    """Pages run out at home while the workers have plenty."""
    engine = make_engine({0: 4 * 22, 1: 400, 2: 400}, max_num_seqs=16, dispatcher=PrimaryOnlyDispatcher())
    sequences = [make_sequence(i, 10 + i % 3, 30) for i in range(16)]
    engine.serve(sequences)
    assert engine.scheduler.num_preemptions == 0
    assert engine.migrator.num_committed > 0


def test_a_fleet_that_waits_for_migrations_runs_steps_without_rows() -> None:
    """All sequences need a page at home at the same time, and only migrations can give them one."""
    engine = make_engine({0: 4 * 8, 1: 400, 2: 400}, max_transfer_pages=1, dispatcher=PrimaryOnlyDispatcher())
    for arrival in range(4):
        engine.scheduler.add(make_sequence(arrival, 7, 17))
    engine.run()
    engine.check_idle()
    assert engine.scheduler.num_preemptions == 0
    assert engine.migrator.num_committed > 0
    assert any(not batch.rows for batch in engine.batches)


def test_the_balance_is_checked_once_per_interval() -> None:
    engine = make_engine({0: 80, 1: 80, 2: 80})
    spy = Spy(make_cost(engine.plan, [device()] * 3))
    spy.calls = []
    balancer = Balancer(engine.cache, engine.migrator, spy, 1e9, EventLog())
    begin = 5000.0
    for _ in range(10):
        balancer.balance([], None, begin)
    assert spy.calls == [], "the first interval begins with the first call"
    for _ in range(10):
        balancer.balance([], None, begin + INTERVAL_SECONDS)
    assert spy.calls == [[]]


def test_only_decoding_sequences_without_migrating_lanes_may_move() -> None:
    engine = make_engine({0: 200, 1: 200, 2: 200}, max_num_batched_tokens=12)
    for arrival, prompt_len in enumerate((4, 4, 30)):
        engine.scheduler.add(make_sequence(arrival, prompt_len, 20))
    engine.step()
    engine.step()
    moving = engine.scheduler.running[0]
    group, source = next((g, r) for g, r in enumerate(engine.cache.owners(moving.slot)[0]))
    target = 1 if source != 1 else 2
    engine.migrator.start([Move(slot=moving.slot, stage=0, group=group, source=source, target=target)])
    balancer = engine.relief
    assert isinstance(balancer, Balancer)
    residents = balancer.residents(engine.scheduler.running)
    assert [resident.movable for resident in residents] == [False, True, False]
    assert residents[0].owners[0][group] == target, "a migrating lane counts at its target"


def test_no_second_migration_starts_for_pages_that_will_come_free() -> None:
    engine = make_engine({0: 200, 1: 200, 2: 200})
    engine.scheduler.add(make_sequence(0, 4, 40))
    engine.step()
    engine.step()
    sequence = engine.scheduler.running[0]
    group, source = next((g, r) for g, r in enumerate(engine.cache.owners(sequence.slot)[0]) if r == 0)
    engine.migrator.start([Move(slot=sequence.slot, stage=0, group=group, source=source, target=1)])
    missing: Mapping[PoolId, int] = {PoolId(0, 0): 1}
    balancer = engine.relief
    assert isinstance(balancer, Balancer)
    assert balancer.make_room(missing, engine.scheduler.running) == {}
    assert balancer.num_reliefs == 0


def test_a_migration_into_a_full_pool_is_cancelled_before_a_sequence_is_preempted() -> None:
    engine = make_engine({0: 200, 1: 200, 2: 200}, max_transfer_pages=1)
    engine.scheduler.add(make_sequence(0, 12, 40))
    engine.step()
    engine.step()
    sequence = engine.scheduler.running[0]
    owners = engine.cache.owners(sequence.slot)
    group = owners[0].index(0)
    engine.migrator.start([Move(slot=sequence.slot, stage=0, group=group, source=0, target=1)])
    free = engine.cache.free_pages(PoolId(1, 0))
    balancer = engine.relief
    assert isinstance(balancer, Balancer)
    assert balancer.make_room({PoolId(1, 0): 2}, engine.scheduler.running) == {}
    assert not engine.migrator.is_busy
    assert engine.cache.owners(sequence.slot) == owners
    assert engine.cache.free_pages(PoolId(1, 0)) >= free + 2
    engine.run()
    engine.check_idle()


def test_pages_that_no_migration_can_free_are_returned() -> None:
    engine = make_engine({0: 200, 1: 200, 2: 200})
    balancer = engine.relief
    assert isinstance(balancer, Balancer)
    assert balancer.make_room({PoolId(0, 0): 3}, []) == {PoolId(0, 0): 3}
    assert not engine.migrator.is_busy
