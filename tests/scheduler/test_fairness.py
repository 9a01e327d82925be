"""Fairness: between two tokens of a sequence a later arrival gets a bounded number, on random fleets, by every policy.

The bound. Let X be a sequence that has been admitted, Y a later one, S the tokens of a page. Between two tokens of X:

- While X runs, it is in every micro-batch that Y is added to, or in flight. Batches return in the order in which they
  were sent, so Y gets at most one token for each batch that X is in, and one for each micro-batch that earlier
  sequences fill before X, or that was sent ahead.
- While X lacks pages or waits to be admitted again, Y allocates no pages. It fills those that it holds: at most S
  tokens. X lacks pages once, and once more for each of its preemptions.
- While lanes migrate to make room for X, others continue in pools that X does not lack, one token per step.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from random import Random

import pytest

from hetis.core.batch import Batch
from hetis.core.placement import Dispatcher
from hetis.dispatcher.hetis_dispatcher import HetisDispatcher
from hetis.dispatcher.rebalance import Rebalancer
from hetis.dispatcher.simple_dispatchers import EvenDispatcher, PrimaryOnlyDispatcher, ProportionalDispatcher
from hetis.engine.balancer import Balancer
from hetis.engine.events import EventLog
from tests.dispatcher.fleets import device, make_cost
from tests.scheduler.toy_engine import ToyEngine, alone, at_depths, make_plan, make_sequence

POLICIES = "primary-only", "even", "proportional", "hetis", "hetis with moves"
GROUPS = [[4]], [[2, 1]], [[2], [2]], [[1], [1], [1]], [[2, 1], [3], [3]]
PAGE_SIZE = 4


@dataclass
class Wait:
    """Events since the last token of a sequence X."""

    num_batches: int = 0  # that X was in
    num_preemptions: int = 0
    num_steps_with_migration: int = 0
    others: Counter[int] = field(default_factory=Counter)  # tokens of each later sequence


class FairEngine(ToyEngine):
    """Checks the bound at every token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.waits: dict[int, Wait] = defaultdict(Wait)  # by arrival; of admitted sequences
        self.preempted: Counter[int] = Counter()
        self.longest = 0

    def _send(self, batch: Batch) -> None:
        assert batch.rows or self.migrator.is_busy, "a step without progress"
        for sequence, _ in batch.admitted:
            self.waits[sequence.arrival].num_preemptions = sequence.num_preemptions - self.preempted[sequence.arrival]
        for wait in self.waits.values():
            wait.num_steps_with_migration += self.migrator.is_busy
        super()._send(batch)

    def _finish(self, batch: Batch, tokens: list[int]) -> None:
        sequences = {row.sequence.arrival: row.sequence for row in batch.rows}
        before = {arrival: sequence.num_output for arrival, sequence in sequences.items()}
        super()._finish(batch, tokens)
        for arrival in sequences:
            self.waits[arrival].num_batches += 1
        drawn = [sequence for arrival, sequence in sequences.items() if sequence.num_output > before[arrival]]
        for sequence in drawn:
            for arrival, wait in self.waits.items():
                if arrival < sequence.arrival:
                    wait.others[sequence.arrival] += 1
        for sequence in drawn:
            self.preempted[sequence.arrival] = sequence.num_preemptions
            wait = self.waits.pop(sequence.arrival)
            self._check_bound(wait)
            if sequence.finish_reason is None:
                self.waits[sequence.arrival] = Wait()

    def _check_bound(self, wait: Wait) -> None:
        most = max(wait.others.values(), default=0)
        bound = wait.num_batches + len(self.stages) + self.depth + PAGE_SIZE * (1 + wait.num_preemptions)
        bound += wait.num_steps_with_migration
        assert most <= bound, f"a later sequence got {most} tokens: {wait}"
        self.longest = max(self.longest, most)


def fair_engine(policy: str, groups: list[list[int]], num_workers: int, random: Random, depth: int) -> FairEngine:
    plan = make_plan(groups, num_workers)
    num_pages = {
        rank: random.randint(2, 30) if plan.is_worker(rank) else plan.num_groups * random.randint(8, 20)
        for rank in plan.ranks
    }
    cost = make_cost(plan, [device(random.choice((0.3, 1, 3))) for _ in plan.members], num_layers=len(groups))

    def balancer(engine: ToyEngine) -> Balancer | None:
        rebalancer = Rebalancer(cost)
        return Balancer(engine.cache, engine.migrator, rebalancer, 0, EventLog()) if "moves" in policy else None

    rules: dict[str, Dispatcher] = {
        "primary-only": PrimaryOnlyDispatcher(),
        "even": EvenDispatcher(),
        "proportional": ProportionalDispatcher(),
    }
    return FairEngine(
        plan,
        num_pages,
        page_size=PAGE_SIZE,
        max_num_seqs=random.choice((3, 8)),
        max_num_batched_tokens=random.choice((3, 16, 64)),
        random=random,
        dispatcher=rules.get(policy) or HetisDispatcher(cost),
        make_relief=balancer,
        depth=depth,
    )


@pytest.mark.parametrize("seed", range(1))
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("groups", "depth"), at_depths(GROUPS), ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_later_sequences_get_no_more_tokens_than_the_bound(
    policy: str, groups: list[list[int]], num_workers: int, seed: int, depth: int
) -> None:
    random = Random(f"{groups} {num_workers} {seed}")
    engine = fair_engine(policy, groups, num_workers, random, depth)
    context = engine.max_model_len
    assert context is not None
    sequences = [make_sequence(a, random.randint(1, context // 2), random.randint(1, context)) for a in range(14)]
    expected = [alone(sequence, context) for sequence in sequences]
    coming = list(sequences)
    while coming or engine.has_work:
        if coming and (random.random() < 0.3 or not engine.has_work):
            engine.scheduler.add(coming.pop(0))
        if engine.has_work:
            engine.step()
    engine.check_idle()
    assert [sequence.token_ids for sequence in sequences] == expected


def test_a_sequence_that_fills_a_worker_alone_is_placed_elsewhere_at_once() -> None:
    """A new placement needs the pages of its whole prompt on its home, which later sequences hold."""
    engine = FairEngine(make_plan([[4]], 1), {0: 4 * 64, 1: 2 * 14}, dispatcher=EvenDispatcher())
    sequences = [make_sequence(arrival, 10, 200) for arrival in range(5)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    engine.run()
    engine.check_idle()
    assert sequences[0].num_preemptions > 0
    assert engine.longest <= 2 * PAGE_SIZE


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_latest_arrivals_are_preempted_also_those_in_flight(stages: int) -> None:
    """Every preempted sequence is later than all running ones, since there is one pool per stage."""
    random = Random(stages)
    engine = FairEngine(make_plan([[2]] * stages), dict.fromkeys(range(stages), 60), random=random)
    sequences = [make_sequence(arrival, random.randint(1, 20), random.randint(20, 80)) for arrival in range(8)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.has_work:
        engine.step()
        waiting = [s.arrival for s in sequences if s.slot < 0 and s.finish_reason is None]
        assert max((s.arrival for s in engine.scheduler.running), default=-1) < min(waiting, default=len(sequences))
    engine.check_idle()
    assert engine.scheduler.num_preemptions > 4
    assert sequences[0].num_preemptions == 0
