"""From a StepCommand to index tensors: all host work of a step happens here, once, so that a layer only launches.

Order of lanes. Decode lanes run over the tokens of decode rows, then head groups; prefill entries over the others, then
head groups. Both ends of a link build the same lists from the same command, so that a message needs no header.
Row of a (token, group) in the flattened QKV of one primary: `token * G_local + (group - first_group)`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetis.core.messages import StepCommand
from hetis.core.spans import Span
from hetis.ranks.pool import PagePool
from hetis.ranks.step_arrays import step_arrays

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step as arrays (host)."""

    slots_R: Ints
    starts_R: Ints
    counts_R: Ints
    num_decode: int

    @classmethod
    def of(cls, command: StepCommand) -> "StepRows":
        slots, starts, counts = (
            np.frombuffer(field, dtype=np.int32).astype(np.int64)
            for field in (command.slots, command.starts, command.counts)
        )
        return cls(slots, starts, counts, command.num_decode)

    @property
    def num_tokens(self) -> int:
        return int(self.counts_R.sum())

    @property
    def num_decode_tokens(self) -> int:
        """More than rows where sequences start over: their output goes through decode again, many tokens in a row."""
        return int(self.counts_R[: self.num_decode].sum())

    def last_tokens(self, rows: NDArray[np.int32]) -> Ints:
        """Where among the step's tokens the last ones of these rows are."""
        stops: Ints = np.cumsum(self.counts_R)[rows] - 1
        return stops

    def tokens_of(self, rows: slice) -> tuple[Ints, Ints]:
        """(slot_T, position_T) of the tokens of `rows`."""
        counts = self.counts_R[rows]
        begin = np.repeat(np.cumsum(counts) - counts, counts)
        position = np.arange(counts.sum()) - begin + np.repeat(self.starts_R[rows], counts)
        return np.repeat(self.slots_R[rows], counts), position


@dataclass(frozen=True, slots=True)
class DecodeLanes:
    """Decode attention of some lanes on one device: `U` rows for `paged_decode`."""

    lane_U: Tensor  # int32, row of the page table
    row_U: Tensor  # int32, row of q and out
    length_U: Tensor  # int32, tokens to attend over, the new one included
    max_length: int  # of length_U, known to the host: bounds the work of a launch without a look at the device
    kv_tokens: float  # read in a layer, over all lanes; on average over the layers, windows considered

    def __len__(self) -> int:
        return self.lane_U.shape[0]


@dataclass(frozen=True, slots=True)
class Append:
    """New K and V rows and where they go in the pool."""

    row_A: Tensor  # int32
    slot_A: Tensor  # int64

    def __len__(self) -> int:
        return self.row_A.shape[0]


@dataclass(frozen=True, slots=True)
class PrefillChunks:
    """Prompt chunks for `paged_prefill`, tokens [first_token, stop_token) of the step."""

    first_token: int
    stop_token: int
    query_start_C1: Tensor  # counted from first_token
    lane_CG: Tensor
    context_C: Tensor


@dataclass(frozen=True, slots=True)
class WholePrompts:
    """Prompt chunks without cached context for `flash_prefill`, the tokens of the step from `first_token` on."""

    first_token: int
    query_start_C1: Tensor  # counted from first_token
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Route:
    """What one link carries in each layer of this step, seen from the primary: rows of its flattened QKV."""

    peer: int
    decode_row_U: Tensor  # int32; q, k, v go out, the attention of the same rows comes back
    prefill_row_A: Tensor  # int32; k, v go out


@dataclass(frozen=True, slots=True)
class PrimaryInput:
    """One step of one primary."""

    num_tokens: int
    num_decode: int  # of them, the first ones
    token_T: Tensor  # int64
    position_T: Tensor  # int64
    sampled_token_R: Tensor  # int64, of the rows that draw a token: their last one, among the step's
    append: Append
    local: DecodeLanes
    prefill: PrefillChunks | None
    whole_prompts: WholePrompts | None
    routes: list[Route]


@dataclass(frozen=True, slots=True)
class WorkerInput:
    """One step of one attention worker for one link: lanes in the order of the primary's message."""

    lanes: DecodeLanes
    append: Append  # decode rows
    prefill_append: Append  # prompt rows

    @property
    def is_empty(self) -> bool:
        """Whether the link carries no tokens in this step."""
        return not (len(self.lanes) or len(self.prefill_append))


def decode_lanes(
    rows: StepRows, owners_BG: NDArray[np.int32], groups: Span, owner: int
) -> tuple[Ints, Ints, Ints, Ints]:
    """(slot, group, position, row in the flattened QKV) of the decode lanes that live on `owner`, token by token.

    Several tokens of a lane are as many problems, each over all tokens up to its own.
    """
    slots, positions = rows.tokens_of(slice(rows.num_decode))
    first, stop = groups
    token, group = np.nonzero(owners_BG[slots, first:stop] == owner)
    return slots[token], group + first, positions[token], token * (stop - first) + group


def prefill_entries(
    rows: StepRows, owners_BG: NDArray[np.int32], groups: Span, owner: int | None
) -> tuple[Ints, Ints, Ints, Ints]:
    """The same for prompt tokens, of lanes on `owner`, or of all lanes for None (the home keeps all in prefill)."""
    slots, positions = rows.tokens_of(slice(rows.num_decode, None))
    first, stop = groups
    chosen = np.ones((len(slots), stop - first), dtype=bool) if owner is None else owners_BG[slots, first:stop] == owner
    token, group = np.nonzero(chosen)
    return slots[token], group + first, positions[token], (token + rows.num_decode_tokens) * (stop - first) + group


class StepPlanner:
    """Turns commands into inputs for one stage on one rank. Keeps who owns which lane.

    Inputs of a step can be used after `upload`, which comes once, when all of them have been asked for.
    """

    def __init__(
        self,
        pool: PagePool,
        num_groups: int,
        max_num_seqs: int,
        windows: Sequence[int],
        device: torch.device,
        *,
        uses_flash: bool = False,
    ) -> None:
        """`pool`: of the rank and stage. `windows`: per layer of the stage; 0: none. `uses_flash`: prompts without
        cached context are `whole_prompts` of the step."""
        self._uses_flash = uses_flash
        self.rank, self.stage, self.num_groups = pool.id.rank, pool.id.stage, num_groups
        self.pool, self._arrays = pool, step_arrays(device)
        self.upload = self._arrays.send
        self._windows = Counter(windows)
        self.owners_BG: NDArray[np.int32] = np.full((max_num_seqs, num_groups), -1, dtype=np.int32)

    def apply(self, command: StepCommand) -> None:
        """Take over lanes that have arrived, new sequences and pages."""
        for slot, stage, group, owner in np.frombuffer(command.landed, dtype=np.int32).reshape(-1, 4):
            if stage == self.stage:
                self.owners_BG[slot, group] = owner
        for new in command.admitted:
            owners = np.frombuffer(new.owners, dtype=np.int32).reshape(-1, self.num_groups)
            self.owners_BG[new.slot] = owners[self.stage]
        self.pool.apply(command.pages)

    def primary_input(self, command: StepCommand, groups: Span, workers: list[int]) -> PrimaryInput:
        rows = StepRows.of(command)
        slots, group, position, local_row = decode_lanes(rows, self.owners_BG, groups, self.rank)
        lanes = slots * self.num_groups + group
        prompt = prefill_entries(rows, self.owners_BG, groups, None)
        prompt_lanes = prompt[0] * self.num_groups + prompt[1]
        append_row = np.concatenate([local_row, prompt[3]])
        append_slot = np.concatenate([self.pool.slots(lanes, position), self.pool.slots(prompt_lanes, prompt[2])])
        _, all_positions = rows.tokens_of(slice(None))
        first_whole = self._first_whole_prompt(rows, groups)
        return PrimaryInput(
            num_tokens=rows.num_tokens,
            num_decode=rows.num_decode_tokens,
            token_T=self._put(np.frombuffer(command.tokens, dtype=np.int32).astype(np.int64)),
            position_T=self._put(all_positions),
            sampled_token_R=self._put(rows.last_tokens(np.frombuffer(command.sampled, dtype=np.int32))),
            append=Append(self._int32(append_row), self._put(append_slot)),
            local=self._decode_lanes(lanes, self._int32(local_row), position),
            prefill=self._chunks(rows, groups, first_whole),
            whole_prompts=self._whole_prompts(rows, first_whole),
            routes=self._routes(rows, groups, workers),
        )

    def worker_input(self, command: StepCommand, groups: Span) -> WorkerInput:
        """For the link to the primary that is the home of `groups`."""
        rows = StepRows.of(command)
        slots, group, position, _ = decode_lanes(rows, self.owners_BG, groups, self.rank)
        lanes = slots * self.num_groups + group
        order = self._int32(np.arange(len(lanes)))
        prompt_slots, prompt_group, prompt_position, _ = prefill_entries(rows, self.owners_BG, groups, self.rank)
        prompt_lanes = prompt_slots * self.num_groups + prompt_group
        return WorkerInput(
            lanes=self._decode_lanes(lanes, order, position),
            append=Append(order, self._put(self.pool.slots(lanes, position))),
            prefill_append=Append(
                self._int32(np.arange(len(prompt_lanes))),
                self._put(self.pool.slots(prompt_lanes, prompt_position)),
            ),
        )

    def _decode_lanes(self, lanes: Ints, row_U: Tensor, position: Ints) -> DecodeLanes:
        max_length = int(position.max(initial=0)) + 1
        seen = sum(
            layers * int(np.minimum(position + 1, window or max_length).sum())
            for window, layers in self._windows.items()
        )
        kv_tokens = seen / self._windows.total()
        return DecodeLanes(self._int32(lanes), row_U, self._int32(position + 1), max_length, kv_tokens)

    def _first_whole_prompt(self, rows: StepRows, groups: Span) -> int:
        """The row from which on all rows are prompts without cached context; no row where flash-attn is not used.

        Prompts that go on mostly come before those that begin, so these are nearly all of them.
        """
        num_rows = len(rows.counts_R)
        if not self._uses_flash or groups[0] == groups[1]:
            return num_rows
        continued = np.flatnonzero(rows.starts_R[rows.num_decode :])
        return rows.num_decode + (int(continued[-1]) + 1 if len(continued) else 0)

    def _chunks(self, rows: StepRows, groups: Span, stop_row: int) -> PrefillChunks | None:
        """Of the prompt rows before `stop_row`."""
        chunks = slice(rows.num_decode, stop_row)
        counts = rows.counts_R[chunks]
        lanes = rows.slots_R[chunks, None] * self.num_groups + np.arange(*groups)[None, :]
        if lanes.size == 0:
            return None
        return PrefillChunks(
            first_token=rows.num_decode_tokens,
            stop_token=rows.num_decode_tokens + int(counts.sum()),
            query_start_C1=self._int32(np.concatenate([[0], np.cumsum(counts)])),
            lane_CG=self._int32(lanes),
            context_C=self._int32(rows.starts_R[chunks] + counts),
        )

    def _whole_prompts(self, rows: StepRows, first_row: int) -> WholePrompts | None:
        counts = rows.counts_R[first_row:]
        if len(counts) == 0:
            return None
        return WholePrompts(
            first_token=int(rows.counts_R[:first_row].sum()),
            query_start_C1=self._int32(np.concatenate([[0], np.cumsum(counts)])),
            max_tokens=int(counts.max()),
        )

    def _routes(self, rows: StepRows, groups: Span, workers: list[int]) -> list[Route]:
        routes = []
        for worker in workers:
            decode_row = decode_lanes(rows, self.owners_BG, groups, worker)[3]
            prefill_row = prefill_entries(rows, self.owners_BG, groups, worker)[3]
            if len(decode_row) or len(prefill_row):
                routes.append(Route(worker, self._int32(decode_row), self._int32(prefill_row)))
        return routes

    def _int32(self, array: NDArray[np.int64]) -> Tensor:
        return self._put(array.astype(np.int32))

    def _put(self, array: NDArray[Any]) -> Tensor:
        return self._arrays.put(array)
