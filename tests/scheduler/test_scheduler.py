"""Rules of the scheduler, one by one, on fleets small enough to count pages by hand."""

import pytest

from tests.scheduler.stepping import answer, engine_of, finish, step
from tests.scheduler.toy_engine import ToyEngine, make_plan, make_sequence, rows_of


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
        assert new is not None
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
    assert [new and new.token for new in new_tokens] == [4, None, 6]
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
    assert engine.cache.usage()[0].pages_used == used, "a step in flight keeps its pages"
    assert answer(engine, batch) == [None]
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


def test_the_longest_possible_sequence_runs_to_its_end_among_others() -> None:
    """`largest_context` is exact: with one page less the longest prompt could never be admitted."""
    engine = ToyEngine(make_plan([[5, 3]], 2), {0: 5 * 6, 1: 3 * 6 + 2, 2: 9, 3: 1})
    assert engine.max_model_len == 24
    lengths = [23, 1, 23, 12, 5]
    for arrival, length in enumerate(lengths):
        engine.scheduler.add(make_sequence(arrival, length, 100))
    engine.run()
    assert [len(sequence.token_ids) for sequence in engine.finished] == [24] * len(lengths)
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


def test_a_new_sequence_is_admitted_while_both_micro_batches_are_in_flight() -> None:
    engine = engine_of(stages=2)
    for arrival in range(2):
        engine.scheduler.add(make_sequence(arrival, 3, 40))
    in_flight = [engine.scheduler.schedule(), engine.scheduler.schedule()]
    engine.scheduler.add(latest := make_sequence(2, 3, 40))
    for _ in range(4):
        batch = in_flight.pop(0)
        assert batch is not None
        answer(engine, batch)
        in_flight.append(engine.scheduler.schedule())
    assert latest.num_output > 0
