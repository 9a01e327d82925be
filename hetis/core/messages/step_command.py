"""One step: the message that tells all ranks what to compute, and its codec.

    objects of the engine --encode--> StepCommand, tables as bytes --decode--> Step, tables as named columns

A table is packed column by column into one `bytes`, little-endian int32. Only this module packs and unpacks; a rank
decodes a command once.

Letters: R rows, T new tokens of all rows, C committed migrations, E entries of a page table, N page transfers or some
of the tokens, I rows that sample a token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from hetis.core.batch import YOURS, Batch
from hetis.core.messages.base import Message
from hetis.core.placement import Move, Placement, PoolId
from hetis.core.request import Sequence as EngineSequence
from hetis.core.sampling_params import SamplingParams

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

_INT32 = np.dtype("<i4")


# --- tables -----------------------------------------------------------------------------------------------------------


class Committed(NamedTuple):
    """Finished migrations: the lane of (slot, stage, group) lives on rank `target` from now on."""

    slot_C: Int32
    stage_C: Int32
    group_C: Int32
    target_C: Int32


class PageEntries(NamedTuple):
    """New entries for the page table of one pool: page number `index` of a lane is `page` of the pool.

    The lane of a sequence's head group is `slot * G + group` on every rank; a lane in prefill that lives elsewhere has
    its staging pages under the same index in the table of its home.
    """

    lane_E: Int32
    index_E: Int32
    page_E: Int32


class PageTransfer(NamedTuple):
    """Pages `first .. stop - 1` of a migrating lane, transferred in one step from rank `source` to rank `target`."""

    stage: int
    lane: int
    source: int
    target: int
    first: int
    stop: int


class Transfers(NamedTuple):
    """`PageTransfer`s as columns."""

    stage_N: Int32
    lane_N: Int32
    source_N: Int32
    target_N: Int32
    first_N: Int32
    stop_N: Int32

    @classmethod
    def of(cls, transfers: Iterable[PageTransfer]) -> "Transfers":
        return _unpack(cls, _pack(_columns(transfers)))

    @property
    def num_pages(self) -> int:
        return int((self.stop_N - self.first_N).sum())

    def select(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> "Transfers":
        """Those of a mask, or of indices in their order."""
        return Transfers(*(column[chosen] for column in self))


# --- the message ------------------------------------------------------------------------------------------------------


class NewSequence(msgspec.Struct, frozen=True, kw_only=True):
    slot: int
    owners: tuple[tuple[int, ...], ...]  # [stage][group] ranks on which its lanes live
    prompt_len: int
    seed: int
    params: SamplingParams


class PoolEntries(msgspec.Struct, frozen=True, kw_only=True):
    """New entries of the page table of the pool (`rank`, `stage`)."""

    rank: int
    stage: int
    entries: bytes  # PageEntries


class StepCommand(Message):
    """One step, the same bytes for every rank. Rows are in batch order, decode rows first.

    Ranks apply in this order: committed migrations, new sequences and pages, the rows, and page transfers, which
    include what the rows append. Without rows only pages are transferred.
    """

    step: int
    committed: bytes  # Committed
    released: list[int]  # slots
    admitted: list[NewSequence]
    pages: list[PoolEntries]
    rows: bytes  # columns slot, start (position of the first new token), count (number of new tokens)
    num_decode_rows: int
    tokens: bytes  # [T] ids of the new tokens; `batch.YOURS` for one that the step before draws
    sampling_rows: bytes  # [I] indices
    transfers: bytes  # Transfers
    prompt_targets: dict[int, bytes] = {}  # by index of a row that scores its prompt: see `Row.prompt_targets`

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // _INT32.itemsize


@dataclass(frozen=True, slots=True)
class Step:
    """A `StepCommand` as one rank uses it. Arrays are read-only: the stages of a worker share them between threads."""

    number: int
    committed: Committed
    released: list[int]  # slots
    admitted: list[NewSequence]
    pages: dict[int, PageEntries]  # by stage, of this rank's pools
    slot_R: Int64
    start_R: Int64  # position of the first new token in the sequence
    count_R: Int64  # new tokens
    token_stop_R: Int64  # where the row's tokens end among the step's
    num_decode_rows: int  # which come first
    num_decode_tokens: int  # more than decode rows where preempted sequences recompute their output, many in a row
    slot_T: Int64
    position_T: Int64  # in the sequence
    token_T: Int64  # ids
    yours_N: Int64  # indices of tokens that the driver does not know: the last ones that the rank has drawn for a slot
    sampling_row_I: Int32
    transfers: Transfers
    prompt_targets: dict[int, Int32]  # by row index: prompt tokens that the logits of the row's first tokens score

    @property
    def num_tokens(self) -> int:
        return len(self.token_T)

    def with_yours(self, token_N: Int64) -> "Step":
        """The step with the ids of the tokens `yours_N`."""
        token_T = self.token_T.copy()
        token_T[self.yours_N] = token_N
        return replace(self, token_T=_read_only(token_T))


# --- the codec --------------------------------------------------------------------------------------------------------


def encode(
    number: int,
    batch: Batch,
    *,
    committed: Sequence[Move] = (),
    pages: Mapping[PoolId, PageEntries] | None = None,
    transfers: Sequence[PageTransfer] = (),
) -> StepCommand:
    """The command for `batch`. `committed`: migrations that have finished since the last command. `pages`: new entries
    of page tables. `transfers`: pages of migrating lanes that go with this step."""
    rows = batch.rows
    return StepCommand(
        step=number,
        committed=_pack(_columns((move.slot, move.stage, move.group, move.target) for move in committed)),
        released=batch.released,
        admitted=[_new_sequence(sequence, placement) for sequence, placement in batch.admitted],
        pages=[
            PoolEntries(rank=pool.rank, stage=pool.stage, entries=_pack(entries))
            for pool, entries in (pages or {}).items()
        ],
        rows=_pack([[row.sequence.slot for row in rows], [row.start for row in rows], [row.count for row in rows]]),
        num_decode_rows=batch.num_decode,
        tokens=np.fromiter(chain.from_iterable(row.token_ids for row in rows), dtype=_INT32).tobytes(),
        sampling_rows=_pack([[index for index, row in enumerate(rows) if row.samples]]),
        transfers=_pack(_columns(transfers)),
        prompt_targets={index: _pack([row.prompt_targets]) for index, row in enumerate(rows) if row.scores_prompt},
    )


def decode(command: StepCommand, rank: int) -> Step:
    """The step as `rank` needs it: of page tables the entries of its own pools."""
    slot_R, start_R, count_R = _int64(np.frombuffer(command.rows, dtype=_INT32).reshape(3, -1))
    token_T = _int64(np.frombuffer(command.tokens, dtype=_INT32))
    stop_R = np.cumsum(count_R)
    position_T = np.arange(len(token_T)) + np.repeat(start_R + count_R - stop_R, count_R)
    return Step(
        number=command.step,
        committed=_unpack(Committed, command.committed),
        released=command.released,
        admitted=command.admitted,
        pages={pool.stage: _unpack(PageEntries, pool.entries) for pool in command.pages if pool.rank == rank},
        slot_R=slot_R,
        start_R=start_R,
        count_R=count_R,
        token_stop_R=_read_only(stop_R),
        num_decode_rows=command.num_decode_rows,
        num_decode_tokens=int(count_R[: command.num_decode_rows].sum()),
        slot_T=_read_only(np.repeat(slot_R, count_R)),
        position_T=_read_only(position_T),
        token_T=token_T,
        yours_N=_read_only(np.flatnonzero(token_T == YOURS)),
        sampling_row_I=np.frombuffer(command.sampling_rows, dtype=_INT32),
        transfers=_unpack(Transfers, command.transfers),
        prompt_targets={row: np.frombuffer(targets, dtype=_INT32) for row, targets in command.prompt_targets.items()},
    )


def _new_sequence(sequence: EngineSequence, placement: Placement) -> NewSequence:
    return NewSequence(
        slot=sequence.slot,
        owners=placement.owners,
        prompt_len=sequence.prompt_len,
        seed=sequence.seed,
        params=sequence.params,
    )


_Table = TypeVar("_Table", Committed, PageEntries, Transfers)


def _pack(columns: Sequence[Sequence[int] | Int32]) -> bytes:
    """A table's columns, all of one length."""
    return np.array(columns, dtype=_INT32).tobytes()


def _unpack(table: type[_Table], data: bytes) -> _Table:
    """Views of `data`, which cannot be written to."""
    return table(*np.frombuffer(data, dtype=_INT32).reshape(len(table._fields), -1))


def _columns(records: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return list(zip(*records, strict=True))


def _int64(array: Int32) -> Int64:
    return _read_only(array.astype(np.int64))


def _read_only(array: Int64) -> Int64:
    array.flags.writeable = False
    return array
