"""One step ahead, rule by rule: two steps in flight, and what ends, gives way or is freed meanwhile."""

from collections.abc import Iterable, Mapping

from hetis.core.batch import YOURS, Batch
from hetis.core.placement import FleetView, NoRelief, Placement, PoolId
from hetis.core.request import Sequence
from hetis.dispatcher.simple_dispatchers import ProportionalDispatcher
from tests.scheduler.stepping import answer, engine_of
from tests.scheduler.toy_engine import ToyEngine, make_plan, make_sequence, rows_of


def send(engine: ToyEngine) -> Batch:
    batch = engine.scheduler.schedule()
    assert batch is not None
    return batch


def idle(engine: ToyEngine) -> bool:
    return engine.scheduler.schedule() is None


def test_a_row_computes_the_token_that_the_step_before_draws() -> None:
    engine = engine_of(depth=1)
    engine.scheduler.add(sequence := make_sequence(0, 3, 9))
    first, second = send(engine), send(engine)
    assert idle(engine), "no more than one step ahead"
    assert rows_of(first) == [("s0", 0, 3)]
    assert rows_of(second) == [("s0", 3, 1)]
    assert second.rows[0].token_ids == [YOURS]
    answer(engine, first, [50])
    third = send(engine)
    assert rows_of(third) == [("s0", 4, 1)]
    assert third.rows[0].token_ids == [YOURS]
    answer(engine, second, [51])
    assert sequence.token_ids[3:] == [50, 51]
    answer(engine, third, [52])
    [row] = send(engine).rows
    assert (row.start, row.token_ids) == (5, [52]), "a step that was not sent ahead has known tokens only"


def test_a_chunk_of_a_prompt_is_sent_while_the_one_before_is_computed() -> None:
    engine = engine_of(depth=1, max_num_batched_tokens=4)
    engine.scheduler.add(make_sequence(0, 6, 9))
    first, second = send(engine), send(engine)
    assert [rows_of(batch) for batch in (first, second)] == [[("s0", 0, 4)], [("s0", 4, 2)]]
    assert [batch.rows[0].samples for batch in (first, second)] == [False, True]
    answer(engine, first)
    assert rows_of(send(engine)) == [("s0", 6, 1)]


def test_an_end_by_length_is_not_scheduled_again() -> None:
    engine = engine_of(depth=1)
    engine.scheduler.add(sequence := make_sequence(0, 3, 2))
    first, second = send(engine), send(engine)
    answer(engine, first)
    assert idle(engine)
    answer(engine, second)
    assert (sequence.finish_reason, sequence.num_output) == ("length", 2)
    engine.check_idle()


def test_what_is_drawn_after_a_stop_token_is_discarded_and_slot_and_pages_are_kept_until_then() -> None:
    engine = engine_of(depth=1, max_num_seqs=1)
    engine.scheduler.add(stopped := make_sequence(0, 3, 9, frozenset({7})))
    engine.scheduler.add(make_sequence(1, 3, 9))
    first, second = send(engine), send(engine)
    answer(engine, first, [7])
    assert (stopped.finish_reason, stopped.token_ids[3:]) == ("stop", [7])
    assert idle(engine), "the slot is named by a step in flight"
    assert engine.cache.usage()[0].pages_used > 0
    assert answer(engine, second, [8]) == [None]
    assert stopped.token_ids[3:] == [7]
    third = send(engine)
    assert third.released == [0]
    assert rows_of(third) == [("s1", 0, 3)]


def test_a_token_that_cannot_be_drawn_ends_a_sequence_that_is_in_the_next_step() -> None:
    engine = engine_of(depth=1)
    engine.scheduler.add(failed := make_sequence(0, 3, 9))
    first, second = send(engine), send(engine)
    [new] = engine.scheduler.on_tokens(first, [0], invalid={0})
    assert new is not None
    assert (new.token, failed.finish_reason, failed.num_output) == (None, "error", 0)
    assert engine.scheduler.on_tokens(second, [0], invalid={0}) == [None]
    engine.check_idle()


def test_an_abort_drops_the_rows_of_both_steps() -> None:
    engine = engine_of(depth=1)
    engine.scheduler.add(aborted := make_sequence(0, 3, 9))
    engine.scheduler.add(make_sequence(1, 3, 9))
    first, second = send(engine), send(engine)
    assert engine.scheduler.abort("s0") is aborted
    used = engine.cache.usage()[0].pages_used
    [dropped, _] = answer(engine, first)
    assert dropped is None
    assert engine.cache.usage()[0].pages_used == used, "the second step has a row of it"
    assert rows_of(third := send(engine)) == [("s1", 4, 1)]
    assert third.released == []
    answer(engine, second)
    assert aborted.num_output == 0
    assert send(engine).released == [0]


def test_a_victim_in_flight_gets_no_further_rows_and_is_preempted_when_its_step_is_back() -> None:
    # Pages of four tokens, two head groups: with 4 + 4 tokens both sequences have filled their pages, and 8 is all
    engine = engine_of(num_pages=8, depth=1)
    first, second = make_sequence(0, 4, 8), make_sequence(1, 3, 8)
    for sequence in (first, second):
        engine.scheduler.add(sequence)
    flying = [send(engine), send(engine)]
    while len(first.token_ids) < 7:
        answer(engine, flying.pop(0))
        flying.append(send(engine))
    assert rows_of(flying[-1]) == [("s0", 7, 1), ("s1", 6, 1)]
    answer(engine, flying.pop(0))
    assert idle(engine), "the ninth token of the first one needs pages that the second one has, and may not fill"
    assert second.num_preemptions == 0
    answer(engine, flying.pop(0))
    assert rows_of(send(engine)) == [("s0", 8, 1)]
    assert second.num_preemptions == 1
    assert len(second.token_ids) == 8, "with the token that its last step has drawn"


class Asked(NoRelief):
    """Has nothing to migrate, and counts how often it was asked."""

    count = 0

    def make_room(self, missing: Mapping[PoolId, int], running: Iterable[Sequence]) -> Mapping[PoolId, int]:
        self.count += 1
        return super().make_room(missing, running)


def test_nothing_migrates_or_gives_way_for_pages_that_come_free_with_a_step_in_flight() -> None:
    """With 8 tokens each all three have filled their pages; the first one ends when the others need more."""
    relief = Asked()
    engine = ToyEngine(make_plan([[2]]), {0: 12}, make_relief=lambda _: relief, depth=1)
    for sequence in (make_sequence(0, 4, 5), make_sequence(1, 4, 8), make_sequence(2, 4, 8)):
        engine.scheduler.add(sequence)
    flying = [send(engine), send(engine)]
    while rows_of(flying[-1]) != [("s0", 7, 1), ("s1", 7, 1), ("s2", 7, 1)]:
        answer(engine, flying.pop(0))
        flying.append(send(engine))
    answer(engine, flying.pop(0))
    assert idle(engine), "no page is free"
    answer(engine, flying.pop(0))
    assert rows_of(send(engine)) == [("s1", 8, 1), ("s2", 8, 1)]
    assert (relief.count, engine.scheduler.num_preemptions) == (0, 0)


class OnWorker(ProportionalDispatcher):
    """Places every lane on rank 1."""

    def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
        return [Placement(owners=((1,),)) for _ in sequences]


def test_staging_is_kept_until_the_prompt_has_come_back_and_does_not_grow() -> None:
    engine = ToyEngine(make_plan([[1]], 1), {0: 2, 1: 9}, max_model_len=8, dispatcher=OnWorker(), depth=1)
    engine.scheduler.add(make_sequence(0, 4, 4))
    first, second = send(engine), send(engine)
    assert rows_of(second) == [("s0", 4, 1)]
    assert [usage.pages_used for usage in engine.cache.usage().values()] == [1, 2]
    answer(engine, first)
    assert [usage.pages_used for usage in engine.cache.usage().values()] == [0, 2]
    engine.cache.check_integrity()


def test_several_stages_keep_their_micro_batches() -> None:
    engine = engine_of(stages=2, depth=1)
    engine.scheduler.add(make_sequence(0, 3, 9))
    send(engine)
    assert idle(engine), "a sequence is in one micro-batch at most"
