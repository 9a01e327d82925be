"""Preemption by recompute: which sequence loses its pages, when, and how it is admitted again."""

from hetis.core.placement import FleetView, NoRelief, Placement, PoolId, Shortage
from hetis.core.request import Sequence
from hetis.dispatcher.simple_dispatchers import ProportionalDispatcher
from tests.scheduler.stepping import answer, engine_of, finish, step
from tests.scheduler.toy_engine import ToyEngine, make_plan, make_sequence, rows_of


def test_no_later_sequence_allocates_a_page_that_an_earlier_one_lacks() -> None:
    """The dispatcher would place it, but the page is held back until migrating lanes have made room."""

    class Scripted(ProportionalDispatcher):
        """Places both lanes of the first sequence on the worker, and one lane of each later one."""

        def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
            return [Placement(owners=((1, 0 if one.arrival else 1),)) for one in sequences]

    class Migrating(NoRelief):
        is_busy = True

        def make_room(self, missing: object, running: object) -> dict[PoolId, int]:
            return {}

    engine = ToyEngine(
        make_plan([[2]], 1), {0: 40, 1: 5}, max_model_len=20, dispatcher=Scripted(), make_relief=lambda _: Migrating()
    )
    engine.scheduler.add(make_sequence(0, 4, 12))
    for _ in range(5):  # tokens 5 to 8 fill the second pages; the ninth needs one page more than there is
        step(engine)
    engine.scheduler.add(later := make_sequence(1, 1, 2))
    assert rows_of(step(engine)) == []
    assert later.slot == -1


def test_the_latest_arrival_is_preempted_and_readmitted_first() -> None:
    # Two head groups, pages of four tokens: a prompt of four tokens takes 2 pages, and 2 more are held back for it.
    engine = engine_of(num_pages=12)
    sequences = [make_sequence(arrival, 4, 6) for arrival in range(4)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    assert rows_of(step(engine)) == [("s0", 0, 4), ("s1", 0, 4), ("s2", 0, 4)]
    for start in range(4, 8):
        assert rows_of(step(engine)) == [(f"s{arrival}", start, 1) for arrival in range(3)]
    batch = step(engine)  # the ninth tokens need pages: the first two sequences get those of the third
    assert rows_of(batch) == [("s0", 8, 1), ("s1", 8, 1)]
    assert batch.released == [2]
    assert [sequence.finish_reason for sequence in sequences] == ["length", "length", None, None]
    batch = step(engine)  # before the fourth: its output is decoded again, in a row of its own
    assert rows_of(batch) == [("s2", 4, 5), ("s2", 0, 4), ("s3", 0, 4)]
    assert batch.num_decode == 1
    assert sequences[2].finish_reason == "length"
    assert rows_of(step(engine)) == [("s3", 4, 1)]
    finish(engine)
    assert [sequence.num_preemptions for sequence in sequences] == [0, 0, 1, 0]
    assert engine.scheduler.num_preemptions == 1
    engine.check_idle()


def test_a_sequence_in_flight_is_not_preempted() -> None:
    engine = engine_of(num_pages=8, stages=2)
    first, second = make_sequence(0, 4, 8), make_sequence(1, 4, 8)
    for sequence in (first, second):
        engine.scheduler.add(sequence)
    batches = [engine.scheduler.schedule(), engine.scheduler.schedule()]
    for _ in range(8):  # 4 tokens of each in two pages per group: full
        batch = batches.pop(0)
        assert batch is not None
        answer(engine, batch)
        batches.append(engine.scheduler.schedule())
    assert [len(sequence.token_ids) for sequence in (first, second)] == [8, 8]
    left, right = batches
    assert left is not None
    assert right is not None
    answer(engine, left)  # the first one lacks a page, and the second one is in flight
    assert engine.scheduler.schedule() is None
    assert second.num_preemptions == 0
    answer(engine, right)
    batch = engine.scheduler.schedule()
    assert batch is not None
    assert rows_of(batch) == [("s0", 8, 1)]
    assert second.num_preemptions == 1


def test_only_holders_of_pages_in_the_exhausted_pool_are_preempted() -> None:
    """The lanes of the latest arrival are on the other worker, so that its pages would not help."""
    rule = Fixed(1)
    engine = ToyEngine(make_plan([[1]], 2), {0: 8, 1: 4, 2: 4}, max_model_len=32, dispatcher=rule)
    sequences = [make_sequence(arrival, 4, 28) for arrival in range(3)]
    for sequence, owner in zip(sequences, (1, 1, 2), strict=True):
        rule.owner = owner
        engine.scheduler.add(sequence)
        step(engine)
    for _ in range(20):
        step(engine)
        if engine.scheduler.num_preemptions:
            break
    assert [sequence.num_preemptions for sequence in sequences] == [0, 1, 0]


class Fixed(ProportionalDispatcher):
    """Places every lane on `owner`; None: proportionally."""

    def __init__(self, owner: int | None) -> None:
        self.owner = owner

    def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
        if self.owner is None:
            return super().assign(sequences, view)
        return [Placement(owners=((self.owner,),)) for _ in sequences]


def test_a_sequence_alone_in_a_full_pool_is_preempted_to_be_placed_elsewhere() -> None:
    rule = Fixed(1)
    engine = ToyEngine(make_plan([[1]], 1), {0: 8, 1: 2}, dispatcher=rule)
    engine.scheduler.add(sequence := make_sequence(0, 4, 28))
    step(engine)
    rule.owner = None
    engine.scheduler.add(make_sequence(1, 4, 10))
    finish(engine)
    assert (sequence.num_preemptions, len(sequence.token_ids)) == (1, 32)
    engine.check_idle()


def test_shortage_names_its_pools() -> None:
    text = str(Shortage({PoolId(2, 1): 3, PoolId(0, 0): 1}))
    assert text == "rank 0 lacks 1 page for stage 0, rank 2 lacks 3 pages for stage 1"
