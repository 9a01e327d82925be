"""Ranks without a model: they keep tags instead of K and V.

Every stage keeps page tables made of new entries alone and, for each cell of its pools, a tag of the token that was
stored there last. Before a row is computed, all earlier tokens of all its lanes must be found in the cells that are
read. So a page freed too early, a stale table entry or a missing staging page shows as a wrong tag.

Tokens are drawn as real ranks draw them: from what the command says, and from the last token drawn for the slot where
the driver does not know it.
"""

from dataclasses import dataclass

import numpy as np

from hetis.core.batch import YOURS, Batch
from hetis.core.messages.step_command import PageEntries, PageTransfer
from hetis.core.placement import Move, PoolId
from hetis.core.plan import Plan

VOCABULARY = 97


def next_token(last: int, num_tokens: int) -> int:
    """The toy model: it depends on the last token and on the position."""
    return (31 * last + 7 * num_tokens + 3) % VOCABULARY


@dataclass(frozen=True)
class FakeRow:
    """A row as a rank knows it, and a number for its sequence to tag tokens with."""

    slot: int
    arrival: int
    start: int
    count: int
    is_decode: bool
    samples: bool
    last_token: int  # of its new tokens


@dataclass(frozen=True)
class Command:
    rows: list[FakeRow]
    owners: dict[int, tuple[tuple[int, ...], ...]]  # of admitted slots
    pages: dict[PoolId, PageEntries]
    batch: Batch
    committed: list[Move]
    transfers: list[PageTransfer]


class FakeStage:
    """All ranks of one stage."""

    def __init__(self, index: int, plan: Plan, num_groups: int, num_pages: dict[int, int], page_size: int) -> None:
        self.index, self.num_groups, self.page_size = index, num_groups, page_size
        self.homes = plan.home_ranks[index]
        ranks = {*self.homes, *plan.worker_ranks}
        self.tables: dict[int, dict[tuple[int, int], int]] = {rank: {} for rank in ranks}  # (lane, index) -> page
        self.memory = {rank: np.full((num_pages[rank], page_size), -1, dtype=np.int64) for rank in ranks}
        self.owners: dict[int, tuple[int, ...]] = {}
        self.drawn: dict[int, int] = {}  # slot -> its last token

    def run(self, command: Command) -> list[int]:
        """The tokens of the rows that sample."""
        for move in command.committed:
            if move.stage == self.index:
                owners = list(self.owners[move.slot])
                assert owners[move.group] == move.source
                owners[move.group] = move.target
                self.owners[move.slot] = tuple(owners)
        for slot, owners in command.owners.items():
            self.owners[slot] = owners[self.index]
        for pool, entries in command.pages.items():
            if pool.stage == self.index:
                written = as_dict(entries)
                assert len(written) == len(entries.lane_E), "an entry of a page table is written twice in one step"
                self.tables[pool.rank].update(written)
        for compute in (self._append, self._attend):  # all K and V of a step are there before any row attends
            for row in command.rows:
                for group in range(self.num_groups):
                    compute(row, group)
        for transfer in command.transfers:
            if transfer.stage == self.index:
                source, target = (
                    [self.tables[rank][transfer.lane, index] for index in range(transfer.first, transfer.stop)]
                    for rank in (transfer.source, transfer.target)
                )
                self.memory[transfer.target][target] = self.memory[transfer.source][source]
        return [self._draw(row) for row in command.rows if row.samples]

    def _draw(self, row: FakeRow) -> int:
        last = self.drawn[row.slot] if row.last_token == YOURS else row.last_token
        self.drawn[row.slot] = next_token(last, row.start + row.count)
        return self.drawn[row.slot]

    def _append(self, row: FakeRow, group: int) -> None:
        owner, home = self.owners[row.slot][group], self.homes[group]
        tags = self._tags(row, group)
        for rank in {owner} if row.is_decode else {owner, home}:
            pages, offsets = self._cells(rank, row, group)
            self.memory[rank][pages[row.start :], offsets[row.start :]] = tags[row.start :]

    def _attend(self, row: FakeRow, group: int) -> None:
        reader = self.owners[row.slot][group] if row.is_decode else self.homes[group]
        found = self.memory[reader][self._cells(reader, row, group)]
        assert np.array_equal(found, self._tags(row, group)), f"{row} reads foreign tokens on rank {reader}"

    def _cells(self, rank: int, row: FakeRow, group: int) -> tuple[np.ndarray, np.ndarray]:
        """(page, offset) of every token of the row's lane, the new ones included."""
        lane, position = row.slot * self.num_groups + group, np.arange(row.start + row.count)
        table = self.tables[rank]
        pages = [table[lane, index] for index in range(position[-1] // self.page_size + 1)]
        return np.array(pages)[position // self.page_size], position % self.page_size

    def _tags(self, row: FakeRow, group: int) -> np.ndarray:
        return (row.arrival * 100_000 + np.arange(row.start + row.count)) * self.num_groups + group


def as_dict(entries: PageEntries) -> dict[tuple[int, int], int]:
    """(lane, page index) -> page."""
    lanes, indices, pages = (column.tolist() for column in entries)
    return dict(zip(zip(lanes, indices, strict=True), pages, strict=True))


def replay(deltas: dict[PoolId, PageEntries], tables: dict[PoolId, dict[tuple[int, int], int]]) -> None:
    """Writes new entries into tables of (lane, page index) -> page, as a rank does."""
    for pool, entries in deltas.items():
        tables.setdefault(pool, {}).update(as_dict(entries))
