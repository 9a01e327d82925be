"""What the scheduler promises, rule by rule, on fleets small enough to count pages by hand."""

import pytest

from hetis.core.batch import Batch, NewToken
from hetis.core.placement import FleetView, NoRelief, Placement, PoolId, Shortage
from hetis.core.request import Sequence
from hetis.dispatcher.simple_dispatchers import ProportionalDispatcher
from tests.scheduler.toy_engine import ToyEngine, make_plan, make_sequence, next_token, rows_of


def engine_of(num_pages: int = 64, stages: int = 1, **options: int) -> ToyEngine:
    """Two head groups per stage, four tokens per page, no workers."""
    plan = make_plan([[2]] * stages)
    return ToyEngine(plan, dict.fromkeys(range(stages), num_pages), **options)


def answer(engine: ToyEngine, batch: Batch, tokens: list[int] | None = None) -> list[NewToken]:
    drawn = [next_token(row.sequence.token_ids) for row in batch.rows if row.samples] if tokens is None else tokens
    return engine.scheduler.on_tokens(batch, drawn)


def step(engine: ToyEngine) -> Batch:
    """One whole step of a fleet with one stage."""
    batch = engine.scheduler.schedule()
    assert batch is not None
    answer(engine, batch)
    return batch


def finish(engine: ToyEngine) -> None:
    while engine.has_work:
        step(engine)


def test_prompts_are_chunked_and_decodes_come_first() -> None:
    engine = engine_of(max_num_batched_tokens=6)
    engine.scheduler.add(make_sequence(0, 4, 9))
    engine.scheduler.add(make_sequence(1, 9, 9))
    engine.scheduler.add(make_sequence(2, 1, 9))
    batches = [step(engine) for _ in range(4)]
    assert [rows_of(batch) for batch in batches] == [
        [("s0", 0, 4), ("s1", 0, 2)],
        [("s0", 4, 1), ("s1", 2, 5)],
        [("s0", 5, 1), ("s1", 7, 2), ("s2", 0, 1)],
        [("s0", 6, 1), ("s1", 9, 1), ("s2", 1, 1)],
    ]
    assert [batch.num_decode for batch in batches] == [0, 1, 1, 3]


def test_the_number_of_running_sequences_is_bounded() -> None:
    engine = engine_of(max_num_seqs=2)
    for arrival in range(3):
        engine.scheduler.add(make_sequence(arrival, 3, 2))
    assert [len(step(engine).rows) for _ in range(3)] == [2, 2, 1]
    assert engine.scheduler.num_waiting == 0


def test_slots_are_reported_once_and_reused_in_the_same_batch() -> None:
    engine = engine_of(max_num_seqs=1)
    engine.scheduler.add(make_sequence(0, 3, 1))
    engine.scheduler.add(make_sequence(1, 3, 2))
    batches = [step(engine) for _ in range(3)]
    assert [batch.released for batch in batches] == [[], [0], []]
    assert [[sequence.id for sequence, _ in batch.admitted] for batch in batches] == [["s0"], ["s1"], []]


@pytest.mark.parametrize(
    ("tokens", "reason", "stop_reason"),
    [([5, 6], "length", None), ([7], "stop", None), ([5, 8], "stop", 8)],
    ids=["max_tokens", "end of sequence", "stop token id"],
)
def test_finish_reasons(tokens: list[int], reason: str, stop_reason: int | None) -> None:
    engine = engine_of()
    sequence = make_sequence(0, 3, 2, frozenset({7, 8}), stop_token_ids=(8,))
    engine.scheduler.add(sequence)
    for token in tokens:
        assert sequence.finish_reason is None
        batch = engine.scheduler.schedule()
        assert batch is not None
        [new] = answer(engine, batch, [token])
        assert (new.sequence, new.token) == (sequence, token)
    assert (sequence.finish_reason, sequence.stop_reason) == (reason, stop_reason)
    assert sequence.token_ids[3:] == tokens
    engine.check_idle()


def test_a_full_context_ends_with_length() -> None:
    engine = engine_of(num_pages=6)
    assert engine.max_model_len == 12
    sequence = make_sequence(0, 5, 100)
    engine.scheduler.add(sequence)
    engine.run()
    assert (len(sequence.token_ids), sequence.finish_reason) == (12, "length")
    engine.check_idle()


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    engine = engine_of(num_pages=6)
    with pytest.raises(ValueError, match="12 tokens and the context 12"):
        engine.scheduler.add(make_sequence(0, 12, 1))
    engine.scheduler.add(make_sequence(0, 11, 1))
    with pytest.raises(ValueError, match="'s0' is in use"):
        engine.scheduler.add(make_sequence(0, 1, 1))
    engine.run()


def test_logits_that_are_not_finite_end_the_sequence_with_an_error() -> None:
    engine = engine_of()
    sequences = [make_sequence(arrival, 3, 5) for arrival in range(3)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    batch = engine.scheduler.schedule()
    assert batch is not None
    new_tokens = engine.scheduler.on_tokens(batch, [4, 5, 6], invalid={1})
    assert [new.token for new in new_tokens] == [4, None, 6]
    assert [sequence.finish_reason for sequence in sequences] == [None, "error", None]
    assert sequences[1].num_output == 0
    finish(engine)
    engine.check_idle()


def test_abort_while_waiting_running_and_in_flight() -> None:
    engine = engine_of(max_num_seqs=2)
    sequences = [make_sequence(arrival, 3, 9) for arrival in range(3)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    step(engine)
    assert engine.scheduler.abort("s2") is sequences[2]
    assert engine.scheduler.abort("s1") is sequences[1]
    used = engine.cache.usage()[0].pages_used
    batch = engine.scheduler.schedule()
    assert batch is not None
    assert rows_of(batch) == [("s0", 3, 1)]
    assert batch.released == [1]
    assert engine.scheduler.abort("s0") is sequences[0]
    assert engine.cache.usage()[0].pages_used == used, "pages of a step in flight must stay"
    assert [new.token for new in answer(engine, batch)] == [None]
    assert [sequence.finish_reason for sequence in sequences] == ["abort"] * 3
    assert engine.scheduler.abort("s0") is None
    assert engine.scheduler.abort("unknown") is None
    engine.check_idle()


def test_an_id_may_be_used_again_while_its_aborted_sequence_is_in_flight() -> None:
    engine = engine_of()
    engine.scheduler.add(make_sequence(0, 3, 9))
    batch = engine.scheduler.schedule()
    assert batch is not None
    engine.scheduler.abort("s0")
    engine.scheduler.add(again := make_sequence(0, 3, 9))
    answer(engine, batch)
    assert engine.scheduler.abort("s0") is again
    engine.check_idle()


def test_no_newcomer_takes_a_page_that_an_earlier_sequence_waits_for() -> None:
    """Whatever the dispatcher thinks: lanes are on the move to make room, and then it is the earlier one's."""

    class Scripted(ProportionalDispatcher):
        """Both lanes of the first one on the worker; one of each later one."""

        def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
            return [Placement(owners=((1, 0 if one.arrival else 1),)) for one in sequences]

    class Moving(NoRelief):
        is_busy = True

        def make_room(self, missing: object, running: object) -> dict[PoolId, int]:
            return {}

    engine = ToyEngine(
        make_plan([[2]], 1), {0: 40, 1: 5}, max_model_len=20, dispatcher=Scripted(), make_relief=lambda _: Moving()
    )
    engine.scheduler.add(make_sequence(0, 4, 12))
    for _ in range(5):  # tokens 5 to 8 fill the second pages; the ninth needs one page more than there is
        step(engine)
    engine.scheduler.add(newcomer := make_sequence(1, 1, 2))
    assert rows_of(step(engine)) == []
    assert newcomer.slot == -1


def test_the_latest_arrived_is_preempted_and_starts_over_first() -> None:
    # Two head groups and pages of four tokens: a prompt of four tokens takes 2 pages, and is promised 2 more to grow.
    engine = engine_of(num_pages=12)
    sequences = [make_sequence(arrival, 4, 6) for arrival in range(4)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    assert rows_of(step(engine)) == [("s0", 0, 4), ("s1", 0, 4), ("s2", 0, 4)]
    for start in range(4, 8):
        assert rows_of(step(engine)) == [(f"s{arrival}", start, 1) for arrival in range(3)]
    batch = step(engine)  # the ninth tokens need pages: the first two take those of the third
    assert rows_of(batch) == [("s0", 8, 1), ("s1", 8, 1)]
    assert batch.released == [2]
    assert [sequence.finish_reason for sequence in sequences] == ["length", "length", None, None]
    batch = step(engine)  # it goes before the fourth; what it had drawn goes through decode again
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
    answer(engine, left)  # the first one needs a page, and the second one is in flight
    assert engine.scheduler.schedule() is None
    assert second.num_preemptions == 0
    answer(engine, right)
    batch = engine.scheduler.schedule()
    assert batch is not None
    assert rows_of(batch) == [("s0", 8, 1)]
    assert second.num_preemptions == 1


def test_only_those_with_pages_in_the_short_pool_are_preempted() -> None:
    """The last one lives on another worker than the one that is full: taking its pages would not help."""
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
    """Every lane on one rank, as long as there is one."""

    def __init__(self, owner: int | None) -> None:
        self.owner = owner

    def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
        if self.owner is None:
            return super().assign(sequences, view)
        return [Placement(owners=((self.owner,),)) for _ in sequences]


def test_a_sequence_alone_in_a_full_pool_is_placed_anew() -> None:
    rule = Fixed(1)
    engine = ToyEngine(make_plan([[1]], 1), {0: 8, 1: 2}, dispatcher=rule)
    engine.scheduler.add(sequence := make_sequence(0, 4, 28))
    step(engine)
    rule.owner = None
    engine.scheduler.add(make_sequence(1, 4, 10))
    finish(engine)
    assert (sequence.num_preemptions, len(sequence.token_ids)) == (1, 32)
    engine.check_idle()


@pytest.mark.parametrize("stages", [2, 3])
def test_micro_batches_share_the_sequences(stages: int) -> None:
    engine = engine_of(stages=stages, max_num_batched_tokens=30)
    for arrival in range(6):
        engine.scheduler.add(make_sequence(arrival, 3, 20))
    in_flight = [engine.scheduler.schedule() for _ in range(stages)]
    assert engine.scheduler.schedule() is None
    for _ in range(30):
        for batch in in_flight:
            assert batch is not None
            assert len(batch.rows) == 6 // stages
        answer(engine, in_flight.pop(0))
        in_flight.append(engine.scheduler.schedule())


def test_micro_batches_share_the_token_budget() -> None:
    engine = engine_of(stages=2, max_num_batched_tokens=10)
    for arrival in range(2):
        engine.scheduler.add(make_sequence(arrival, 9, 4))
    left, right = engine.scheduler.schedule(), engine.scheduler.schedule()
    assert left is not None
    assert right is not None
    assert rows_of(left) == [("s0", 0, 5)]
    assert rows_of(right) == [("s1", 0, 5)]


def test_a_newcomer_finds_a_place_while_both_micro_batches_are_busy() -> None:
    engine = engine_of(stages=2)
    for arrival in range(2):
        engine.scheduler.add(make_sequence(arrival, 3, 40))
    in_flight = [engine.scheduler.schedule(), engine.scheduler.schedule()]
    engine.scheduler.add(newcomer := make_sequence(2, 3, 40))
    for _ in range(4):
        batch = in_flight.pop(0)
        assert batch is not None
        answer(engine, batch)
        in_flight.append(engine.scheduler.schedule())
    assert newcomer.num_output > 0


def test_the_longest_possible_sequence_runs_to_its_end_among_others() -> None:
    """`largest_context` is exact: one page less and the longest prompt could never be admitted."""
    engine = ToyEngine(make_plan([[5, 3]], 2), {0: 5 * 6, 1: 3 * 6 + 2, 2: 9, 3: 1})
    assert engine.max_model_len == 24
    lengths = [23, 1, 23, 12, 5]
    for arrival, length in enumerate(lengths):
        engine.scheduler.add(make_sequence(arrival, length, 100))
    engine.run()
    assert [len(sequence.token_ids) for sequence in engine.finished] == [24] * len(lengths)
    engine.check_idle()


def test_shortage_names_its_pools() -> None:
    text = str(Shortage({PoolId(2, 1): 3, PoolId(0, 0): 1}))
    assert text == "rank 0 lacks 1 page for stage 0, rank 2 lacks 3 pages for stage 1"
