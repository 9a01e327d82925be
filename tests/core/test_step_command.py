"""A step reaches a rank, through msgpack, as the engine meant it, and decoded arrays cannot be written to."""

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest

from hetis.core.batch import YOURS, Batch, Row
from hetis.core.messages import StepCommand
from hetis.core.messages.step_command import PageEntries, PageTransfer, Step, Transfers, decode, encode
from hetis.core.placement import Move, Placement, PoolId
from hetis.core.request import Sequence
from hetis.core.sampling_params import SamplingParams

OWNERS = ((0, 1, 2), (1, 1, 2))  # two stages, three head groups
MOVES = [Move(slot=2, stage=1, group=0, source=1, target=2), Move(slot=2, stage=0, group=2, source=2, target=0)]
TRANSFERS = [PageTransfer(0, 5, 0, 2, 1, 4), PageTransfer(1, 3, 2, 1, 0, 2)]
PAGES = {
    PoolId(0, 0): PageEntries(*np.array([[3, 3, 4], [0, 1, 0], [7, 9, 2]], dtype=np.int32)),
    PoolId(2, 0): PageEntries(*np.array([[5], [2], [1]], dtype=np.int32)),
    PoolId(2, 1): PageEntries(*np.array([[5, 5], [2, 3], [8, 6]], dtype=np.int32)),
}


def sequence(slot: int, token_ids: list[int], prompt_len: int, **params: Any) -> Sequence:
    return Sequence(
        id=str(slot),
        token_ids=token_ids,
        prompt_len=prompt_len,
        params=SamplingParams(**params),
        max_tokens=9,
        seed=(1 << 63) - slot,
        stop_ids=frozenset(),
        arrival=slot,
        slot=slot,
    )


def make_batch() -> Batch:
    """A decode token, one that is being drawn, a recomputed output, the middle and the end of prompts that are scored,
    and a prompt's start."""
    decode, recomputed = sequence(4, [1, 2, 3], 2), sequence(0, [5, 6, 7, 8, 9], 2, prompt_logprobs=1)
    drawing = sequence(7, [1, 2], 2, prompt_logprobs=1)
    middle, end = (sequence(slot, [10, 11, 12, 13, 14, 15], 6, prompt_logprobs=0) for slot in (2, 3))
    start = sequence(1, [20, 21, 22], 3)
    return Batch(
        rows=[
            Row(sequence=decode, start=2, count=1, samples=True),
            Row(sequence=drawing, start=2, count=1, samples=True),
            Row(sequence=recomputed, start=2, count=3, samples=True),
            Row(sequence=middle, start=1, count=2, samples=False),
            Row(sequence=end, start=4, count=2, samples=True),
            Row(sequence=start, start=0, count=2, samples=False),
        ],
        admitted=[(start, Placement(owners=OWNERS))],
        released=[6, 5],
    )


def received(command: StepCommand, rank: int) -> Step:
    return decode(msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=StepCommand), rank)


def test_rows_and_tokens() -> None:
    step = received(encode(17, make_batch()), 0)
    assert step.number == 17
    assert step.slot_R.tolist() == [4, 7, 0, 2, 3, 1]
    assert step.start_R.tolist() == [2, 2, 2, 1, 4, 0]
    assert step.count_R.tolist() == [1, 1, 3, 2, 2, 2]
    assert step.token_stop_R.tolist() == [1, 2, 5, 7, 9, 11]
    assert (step.num_decode_rows, step.num_decode_tokens, step.num_tokens) == (3, 5, 11)
    assert step.slot_T.tolist() == [4, 7, 0, 0, 0, 2, 2, 3, 3, 1, 1]
    assert step.position_T.tolist() == [2, 2, 2, 3, 4, 1, 2, 4, 5, 0, 1]
    assert step.token_T.tolist() == [3, YOURS, 7, 8, 9, 11, 12, 14, 15, 20, 21]
    assert step.sampling_row_I.tolist() == [0, 1, 2, 4]


def test_tokens_that_the_driver_does_not_know_are_those_of_the_rank() -> None:
    step = received(encode(17, make_batch()), 0)
    assert step.yours_N.tolist() == [1]
    assert step.slot_T[step.yours_N].tolist() == [7]
    known = step.with_yours(np.array([99]))
    assert known.token_T.tolist() == [3, 99, 7, 8, 9, 11, 12, 14, 15, 20, 21]
    assert not known.token_T.flags.writeable
    assert step.token_T[1] == YOURS


def test_prompt_targets_are_the_next_tokens_of_the_prompt() -> None:
    """The recomputed sequence asks for them as well, but has them since its first output token."""
    step = received(encode(0, make_batch()), 0)
    assert {row: targets.tolist() for row, targets in step.prompt_targets.items()} == {3: [12, 13], 4: [15]}


def test_new_and_released_sequences() -> None:
    batch = make_batch()
    step = received(encode(0, batch), 0)
    (new,) = step.admitted
    assert (new.slot, new.owners, new.prompt_len, new.seed) == (1, OWNERS, 3, (1 << 63) - 1)
    assert new.params == batch.admitted[0][0].params
    assert step.released == [6, 5]


def test_migrations_and_page_transfers() -> None:
    step = received(encode(0, make_batch(), committed=MOVES, transfers=TRANSFERS), 0)
    assert list(zip(*(column.tolist() for column in step.committed), strict=True)) == [(2, 1, 0, 2), (2, 0, 2, 0)]
    for found in (step.transfers, Transfers.of(TRANSFERS)):
        assert list(zip(*(column.tolist() for column in found), strict=True)) == TRANSFERS
    assert step.transfers.num_pages == 5
    assert step.transfers.select(step.transfers.target_N == 1).lane_N.tolist() == [3]
    assert step.transfers.select(np.array([1, 0])).first_N.tolist() == [0, 1]


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_gets_the_entries_of_its_own_page_tables(rank: int) -> None:
    found = received(encode(0, make_batch(), pages=PAGES), rank).pages
    expected = {pool.stage: entries for pool, entries in PAGES.items() if pool.rank == rank}
    assert found.keys() == expected.keys()
    for stage, entries in expected.items():
        assert np.array_equal(found[stage], entries)


def test_a_step_without_rows_has_empty_tables() -> None:
    step = received(encode(0, Batch(rows=[], admitted=[], released=[])), 0)
    assert step.num_tokens == step.num_decode_rows == step.num_decode_tokens == 0
    arrays = arrays_of(step)
    assert arrays
    assert all(array.size == 0 for array in arrays)


def test_arrays_are_read_only() -> None:
    step = received(encode(0, make_batch(), committed=MOVES, pages=PAGES, transfers=TRANSFERS), 0)
    arrays = arrays_of(step)
    assert len(arrays) == 9 + 4 + 3 + 6 + 2
    assert not any(array.flags.writeable for array in arrays)


def arrays_of(value: Any) -> list[np.ndarray]:
    """All arrays in a step or a part of it."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, Step):
        return arrays_of([getattr(value, field.name) for field in dataclasses.fields(value)])
    if isinstance(value, dict):
        return arrays_of(list(value.values()))
    return [array for each in value for array in arrays_of(each)] if isinstance(value, list | tuple) else []
