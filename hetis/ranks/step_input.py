"""From a step to index tensors: all host work of a step happens here, once, so that a layer only launches kernels.

Order of lanes. Decode lanes run over the tokens of decode rows, then head groups; prefill entries over the other
tokens, then head groups. Both ends of a link build the same lists from the same command, so a message needs no header.
Index of a (token, group) in the flattened QKV of one primary: `token * G_local + (group - first_group)`.

Letters: R rows and T tokens of the step, B slots, G head groups, U decode lanes, A (token, group) pairs, C prompt
chunks, I rows that sample a token.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetis.core.messages.step_command import Int32, Int64, Step
from hetis.core.spans import Span
from hetis.ranks.pool import PagePool
from hetis.ranks.step_arrays import step_arrays


@dataclass(frozen=True, slots=True)
class DecodeLanes:
    """Decode attention of some lanes on one device: `U` problems for `paged_decode`."""

    lane_U: Tensor  # int32, of the page table
    qkv_U: Tensor  # int32, index of q and of the output
    length_U: Tensor  # int32, tokens to attend over, the new one included
    max_length: int  # of length_U, known to the host: bounds the work of a launch without reading the device
    kv_tokens: float  # read in a layer, over all lanes; mean over the layers, windows considered

    def __len__(self) -> int:
        return self.lane_U.shape[0]


@dataclass(frozen=True, slots=True)
class Append:
    """New K and V, and the cells of the pool that they are written to."""

    qkv_A: Tensor  # int32
    cell_A: Tensor  # int64

    def __len__(self) -> int:
        return self.qkv_A.shape[0]


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
    """Content of one link's messages in each layer of this step, as indices of the primary's flattened QKV."""

    peer: int
    decode_qkv_U: Tensor  # int32; q, k, v are sent, the attention of the same indices comes back
    prefill_qkv_A: Tensor  # int32; k, v are sent


@dataclass(frozen=True, slots=True)
class PrimaryInput:
    """One step of one primary."""

    num_tokens: int
    num_decode: int  # of them, the first ones
    token_T: Tensor  # int64
    position_T: Tensor  # int64
    last_token_I: Tensor  # int64, index among the step's tokens of each sampling row's last one
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


class Pairs(NamedTuple):
    """(token, head group) pairs, token by token. Several tokens of a lane are as many decode problems."""

    lane_A: Int64
    position_A: Int64
    qkv_A: Int64


class StepPlanner:
    """Turns steps into inputs for one stage on one rank. Keeps the owner of every lane.

    Inputs of a step can be used after `upload`, which is called once, after all of them have been asked for.
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
        self._new_pages_3E: Tensor | None = None  # of the page table on the device
        self._windows = Counter(windows)
        self.owners_BG: Int32 = np.full((max_num_seqs, num_groups), -1, dtype=np.int32)

    def apply(self, step: Step) -> None:
        """Applies committed migrations, then the owners of new sequences and new pages, to this stage's tables."""
        slot_C, stage_C, group_C, target_C = step.committed
        here = stage_C == self.stage
        self.owners_BG[slot_C[here], group_C[here]] = target_C[here]
        for new in step.admitted:
            self.owners_BG[new.slot] = new.owners[self.stage]
        if self.stage in step.pages:
            entries = step.pages[self.stage]
            self.pool.apply(entries)
            if self.pool.table_BW.device.type != "cpu":
                self._new_pages_3E = self._put(np.stack(entries).astype(np.int64))

    def upload(self) -> None:
        """Makes inputs and new pages of this step available to work that the current stream gets from now on."""
        self._arrays.send()
        if self._new_pages_3E is not None:
            self.pool.apply_on_device(self._new_pages_3E)
            self._new_pages_3E = None

    def primary_input(self, step: Step, groups: Span, workers: list[int]) -> PrimaryInput:
        owner_TG = self.owners_BG[step.slot_T, slice(*groups)]
        decode = self._pairs(step, groups, _decode_part(step), owner_TG == self.rank)
        prompt = self._pairs(step, groups, _prompt_part(step), np.ones_like(owner_TG, dtype=bool))  # staging included
        first_whole = self._first_whole_prompt(step, groups)
        return PrimaryInput(
            num_tokens=step.num_tokens,
            num_decode=step.num_decode_tokens,
            token_T=self._put(step.token_T),
            position_T=self._put(step.position_T),
            last_token_I=self._put(step.token_stop_R[step.sampling_row_I] - 1),
            append=self._append(Pairs(*map(np.concatenate, zip(decode, prompt, strict=True)))),
            local=self._decode_lanes(decode, self._int32(decode.qkv_A)),
            prefill=self._chunks(step, groups, first_whole),
            whole_prompts=self._whole_prompts(step, first_whole),
            routes=self._routes(step, groups, owner_TG, workers),
        )

    def worker_input(self, step: Step, groups: Span) -> WorkerInput:
        """The input for the link to the primary that is the home of `groups`."""
        is_here_TG = self.owners_BG[step.slot_T, slice(*groups)] == self.rank
        decode = self._pairs(step, groups, _decode_part(step), is_here_TG)
        prompt = self._pairs(step, groups, _prompt_part(step), is_here_TG)
        append = self._append(decode._replace(qkv_A=np.arange(len(decode.lane_A))))
        return WorkerInput(
            lanes=self._decode_lanes(decode, append.qkv_A),
            append=append,
            prefill_append=self._append(prompt._replace(qkv_A=np.arange(len(prompt.lane_A)))),
        )

    def _pairs(self, step: Step, groups: Span, tokens: slice, chosen_TG: NDArray[np.bool_]) -> Pairs:
        """The chosen pairs of `tokens` (a slice of the step's) and `groups`."""
        first, stop = groups
        token, group = np.nonzero(chosen_TG[tokens])
        token += tokens.start
        lane_A = step.slot_T[token] * self.num_groups + (group + first)
        return Pairs(lane_A, step.position_T[token], token * (stop - first) + group)

    def _append(self, pairs: Pairs) -> Append:
        return Append(self._int32(pairs.qkv_A), self._put(self.pool.cells(pairs.lane_A, pairs.position_A)))

    def _decode_lanes(self, pairs: Pairs, qkv_U: Tensor) -> DecodeLanes:
        length_U = pairs.position_A + 1
        max_length = int(length_U.max(initial=1))
        seen = sum(
            layers * int(np.minimum(length_U, window or max_length).sum()) for window, layers in self._windows.items()
        )
        kv_tokens = seen / self._windows.total()
        return DecodeLanes(self._int32(pairs.lane_A), qkv_U, self._int32(length_U), max_length, kv_tokens)

    def _first_whole_prompt(self, step: Step, groups: Span) -> int:
        """The row from which on all rows are prompts without cached context; no row where flash-attn is not used.

        Prompts that are continued mostly come before those that begin, so these are nearly all of them.
        """
        if not self._uses_flash or groups[0] == groups[1]:
            return len(step.count_R)
        continued = np.flatnonzero(step.start_R[step.num_decode_rows :])
        return step.num_decode_rows + (int(continued[-1]) + 1 if len(continued) else 0)

    def _chunks(self, step: Step, groups: Span, stop_row: int) -> PrefillChunks | None:
        """The prompt rows before `stop_row`."""
        chunks = slice(step.num_decode_rows, stop_row)
        count_C = step.count_R[chunks]
        lane_CG = step.slot_R[chunks, None] * self.num_groups + np.arange(*groups)
        if lane_CG.size == 0:
            return None
        return PrefillChunks(
            first_token=step.num_decode_tokens,
            stop_token=step.num_decode_tokens + int(count_C.sum()),
            query_start_C1=self._int32(np.concatenate([[0], np.cumsum(count_C)])),
            lane_CG=self._int32(lane_CG),
            context_C=self._int32(step.start_R[chunks] + count_C),
        )

    def _whole_prompts(self, step: Step, first_row: int) -> WholePrompts | None:
        count_C = step.count_R[first_row:]
        if len(count_C) == 0:
            return None
        return WholePrompts(
            first_token=step.num_tokens - int(count_C.sum()),
            query_start_C1=self._int32(np.concatenate([[0], np.cumsum(count_C)])),
            max_tokens=int(count_C.max()),
        )

    def _routes(self, step: Step, groups: Span, owner_TG: Int32, workers: list[int]) -> list[Route]:
        routes = []
        for worker in workers:
            there_TG = owner_TG == worker
            decode_qkv = self._pairs(step, groups, _decode_part(step), there_TG).qkv_A
            prefill_qkv = self._pairs(step, groups, _prompt_part(step), there_TG).qkv_A
            if len(decode_qkv) or len(prefill_qkv):
                routes.append(Route(worker, self._int32(decode_qkv), self._int32(prefill_qkv)))
        return routes

    def _int32(self, array: Int64) -> Tensor:
        return self._put(array.astype(np.int32))

    def _put(self, array: NDArray[Any]) -> Tensor:
        return self._arrays.put(array)


def _decode_part(step: Step) -> slice:
    """The tokens of decode rows."""
    return slice(0, step.num_decode_tokens)


def _prompt_part(step: Step) -> slice:
    return slice(step.num_decode_tokens, step.num_tokens)
