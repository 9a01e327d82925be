"""Where pages run out, an earlier sequence never waits while later ones go on: on random fleets, under every policy.

The bound. Let X be a sequence that has been admitted, Y a later one, S the tokens of a page. Between two tokens of X:

- While X runs it is in every micro-batch that Y enters, or in flight: batches return in the order in which they were
  sent, so Y gets at most one token for each batch that X is in, and one for each micro-batch that earlier sequences
  fill before X.
- While X lacks pages, or waits to come back, Y takes no pages. It has those that it holds: at most S tokens. X lacks
  pages once, and once more for each time that it is preempted.
- Where lanes move to make room for X, others go on in pools that X does not lack, a token in a step.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from random import Random

import pytest

from hetis.core.batch import Batch
from hetis.core.placement import Dispatcher
from hetis.dispatcher.proportional import ProportionalDispatcher
from hetis.dispatcher.rebalance import Rebalancer
from hetis.dispatcher.rules import EvenDispatcher, HetisDispatcher, PrimaryOnlyDispatcher
from hetis.engine.balancer import Balancer
from tests.dispatcher.fleets import device, make_cost
from tests.scheduler.toy_engine import ToyEngine, alone, make_plan, make_sequence

POLICIES = "primary-only", "even", "proportional", "hetis", "hetis with moves"
GROUPS = [[4]], [[2, 1]], [[2], [2]], [[1], [1], [1]], [[2, 1], [3], [3]]
PAGE_SIZE = 4


@dataclass
class Wait:
    """What has happened since the last token of a sequence."""

    num_batches: int = 0  # that it was in
    num_preemptions: int = 0
    num_moving_steps: int = 0
    others: Counter[int] = field(default_factory=Counter)  # tokens of later ones


class FairEngine(ToyEngine):
    """Holds every token against the bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.waits: dict[int, Wait] = defaultdict(Wait)  # by arrival, of those that have been admitted
        self.preempted: Counter[int] = Counter()
        self.longest = 0

    def _send(self, batch: Batch) -> None:
        assert batch.rows or self.hauler.is_busy, "a step in which nothing gets on"
        for sequence, _ in batch.admitted:
            self.waits[sequence.arrival].num_preemptions = sequence.num_preemptions - self.preempted[sequence.arrival]
        for wait in self.waits.values():
            wait.num_moving_steps += self.hauler.is_busy
        super()._send(batch)

    def _finish(self, batch: Batch) -> None:
        sequences = {row.sequence.arrival: row.sequence for row in batch.rows}
        before = {arrival: sequence.num_output for arrival, sequence in sequences.items()}
        super()._finish(batch)
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
            self._hold_against_the_bound(wait)
            if sequence.finish_reason is None:
                self.waits[sequence.arrival] = Wait()

    def _hold_against_the_bound(self, wait: Wait) -> None:
        most = max(wait.others.values(), default=0)
        bound = wait.num_batches + len(self.stages) + PAGE_SIZE * (1 + wait.num_preemptions) + wait.num_moving_steps
        assert most <= bound, f"a later sequence got {most} tokens: {wait}"
        self.longest = max(self.longest, most)


def fair_engine(policy: str, groups: list[list[int]], num_workers: int, random: Random) -> FairEngine:
    plan = make_plan(groups, num_workers)
    num_groups = plan.stages[0].primaries[-1].groups[1]
    num_pages = {
        rank: num_groups * random.randint(8, 20) if plan.role_of(rank) == "primary" else random.randint(2, 30)
        for rank in range(plan.world_size)
    }
    cost = make_cost(plan, [device(random.choice((0.3, 1, 3))) for _ in plan.members()], num_layers=len(groups))

    def balancer(engine: ToyEngine) -> Balancer | None:
        rebalancer = Rebalancer(cost)
        return Balancer(engine.cache, engine.hauler, rebalancer, 0) if "moves" in policy else None

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
    )


@pytest.mark.parametrize("seed", range(1))
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_earlier_sequences_do_not_wait_for_later_ones(
    policy: str, groups: list[list[int]], num_workers: int, seed: int
) -> None:
    random = Random(f"{groups} {num_workers} {seed}")
    engine = fair_engine(policy, groups, num_workers, random)
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


def test_a_sequence_that_fills_a_worker_alone_is_placed_anew_at_once() -> None:
    """The oldest needs its whole prompt's pages at home then, which later ones hold."""
    engine = FairEngine(make_plan([[4]], 1), {0: 4 * 64, 1: 2 * 14}, dispatcher=EvenDispatcher())
    sequences = [make_sequence(arrival, 10, 200) for arrival in range(5)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    engine.run()
    engine.check_idle()
    assert sequences[0].num_preemptions > 0
    assert engine.longest <= 2 * PAGE_SIZE


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_latest_arrival_gives_way_also_when_it_is_in_flight(stages: int) -> None:
    """With one pool per stage, preempted sequences are later than all that run."""
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
