"""Random requests on random small fleets: all complete as if they ran alone, and no page leaks."""

from random import Random

import pytest

from hetis.core.request import Sequence
from tests.scheduler.toy_engine import ToyEngine, alone, at_depths, churn, make_plan, make_sequence

GROUPS = [[8]], [[5, 3]], [[1]], [[3], [3]], [[5, 3], [8]], [[2, 1], [1, 1, 1], [3]]


def random_engine(
    random: Random, groups: list[list[int]], num_workers: int, moves_per_step: float, depth: int
) -> ToyEngine:
    plan = make_plan(groups, num_workers)
    page_size = random.choice([1, 4, 7])
    biggest = max(max(counts) for counts in groups)
    num_pages = {
        rank: random.randint(0, 40) if plan.is_worker(rank) else biggest * random.randint(3, 12) for rank in plan.ranks
    }
    return ToyEngine(
        plan,
        num_pages,
        page_size=page_size,
        max_num_seqs=random.choice([1, 3, 8]),
        max_num_batched_tokens=random.choice([1, 5, 16, 64]),
        random=random,
        moves_per_step=moves_per_step,
        max_transfer_pages=random.choice([1, 2, 50]),
        depth=depth,
    )


def random_sequence(random: Random, arrival: int, context: int) -> Sequence:
    prompt_len = random.randint(1, context - 1) if random.random() < 0.5 else min(random.randint(1, 6), context - 1)
    max_tokens = random.randint(1, context + 5) if random.random() < 0.3 else random.randint(1, 10)
    return make_sequence(arrival, prompt_len, max_tokens, frozenset(random.sample(range(97), random.choice([0, 0, 2]))))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize(("groups", "depth"), at_depths(GROUPS), ids=str)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("moves_per_step", [0.0, 0.5])
def test_random_requests_complete_as_if_alone(
    groups: list[list[int]], num_workers: int, seed: int, moves_per_step: float, depth: int
) -> None:
    """Lanes migrate at random, and sequences finish, are aborted or are preempted during their migration."""
    random = Random(f"{groups} {num_workers} {seed}")
    engine = random_engine(random, groups, num_workers, moves_per_step, depth)
    context = engine.max_model_len
    assert context is not None
    sequences = [random_sequence(random, arrival, context) for arrival in range(40)]
    expected = [alone(sequence, context) for sequence in sequences]
    aborted = churn(engine, sequences, random, engine.step)
    for sequence, tokens in zip(sequences, expected, strict=True):
        if sequence.id in aborted:
            assert sequence.finish_reason == "abort"
            assert sequence.token_ids == tokens[: len(sequence.token_ids)]
        else:
            assert sequence.token_ids == tokens
            assert sequence.finish_reason == ("stop" if tokens[-1] in sequence.stop_ids else "length")
    assert engine.scheduler.num_preemptions == sum(sequence.num_preemptions for sequence in sequences)


@pytest.mark.parametrize("depth", [0, 1])
def test_soak_covers_preemption_and_staging(depth: int) -> None:
    """Sizes like those above are small enough for preemptions, and for lanes on every rank."""
    random = Random(5)
    engine = ToyEngine(make_plan([[5, 3]], 2), {0: 40, 1: 24, 2: 30, 3: 50}, random=random, depth=depth)
    for arrival in range(40):
        engine.scheduler.add(make_sequence(arrival, random.randint(1, 20), random.randint(1, 31)))
    engine.run()
    engine.check_idle()
    owners = {owner for batch in engine.batches for _, placement in batch.admitted for owner in placement.owners[0]}
    assert engine.scheduler.num_preemptions > 0
    assert owners == {0, 1, 2, 3}


@pytest.mark.parametrize("depth", [0, 1])
def test_soak_covers_migrations_of_every_kind(depth: int) -> None:
    random = Random(5)
    plan = make_plan([[5, 3]], 2)
    engine = ToyEngine(plan, {0: 60, 1: 40, 2: 90, 3: 90}, random=random, moves_per_step=0.7, depth=depth)
    for arrival in range(60):
        engine.scheduler.add(make_sequence(arrival, random.randint(1, 20), random.randint(1, 31)))
    engine.run()
    engine.check_idle()
    homes = {0, 1}
    kinds = {(move.source in homes, move.target in homes) for move in engine.started}
    assert kinds == {(True, False), (False, True), (False, False)}
    assert 0 < engine.migrator.num_committed < len(engine.started), "some must be cancelled"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_admission_is_first_come_first_served(num_workers: int) -> None:
    random = Random(num_workers)
    engine = ToyEngine(make_plan([[5, 3], [8]], num_workers), {0: 40, 1: 24, 2: 64, 3: 20, 4: 20}, random=random)
    sequences = [make_sequence(arrival, random.randint(1, 25), random.randint(1, 6)) for arrival in range(50)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.has_work:
        engine.step()
        for batch in engine.batches[-1:]:
            latest = max((sequence.arrival for sequence, _ in batch.admitted), default=-1)
            waiting = [s.arrival for s in sequences if s.slot < 0 and s.finish_reason is None and not s.num_preemptions]
            assert latest < min(waiting, default=1_000), "a later sequence was admitted first"
    engine.check_idle()
