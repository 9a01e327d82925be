"""Which tokens are computed next: continuous batching with chunked prefill, first come first served.

Running decodes first, then the next chunks of running prompts, then waiting sequences. Pages of a whole prompt, staging
included, are taken at admission, so only decodes can run out of pages; then whoever came last starts over later.

Where lanes can move, they make room before anybody starts over; meanwhile those who lack pages wait.

With n pipeline stages at most n micro-batches are in flight, and a sequence is in at most one of them. Each takes at
most an n-th of the sequences and of the token budget, so that every stage has work.
"""

from bisect import insort
from collections.abc import Collection, Iterable
from operator import attrgetter

from hetis.cache.lane_table import CacheManager
from hetis.core.batch import Batch, NewToken, Row
from hetis.core.placement import Dispatcher, NoRelief, Placement, PoolId, Relief
from hetis.core.request import Sequence

_ARRIVAL = attrgetter("arrival")


class Scheduler:
    """Owns the sequences from `add` until they finish, and their slots."""

    def __init__(
        self,
        cache: CacheManager,
        dispatcher: Dispatcher,
        relief: Relief | None = None,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_stages: int = 1,
    ) -> None:
        """`max_num_batched_tokens`: of all micro-batches in flight together. `max_model_len`: at most the context that
        a sequence finds room for when it has the fleet for itself."""
        self._cache, self._dispatcher, self._relief = cache, dispatcher, relief or NoRelief()
        self._max_model_len, self._num_stages = max_model_len, num_stages
        self._token_budget = _share(max_num_batched_tokens, num_stages)
        self._waiting: list[Sequence] = []  # in order of arrival
        self._running: list[Sequence] = []  # too
        self._unfinished: dict[str, Sequence] = {}
        self._free_slots = list(reversed(range(max_num_seqs)))
        self._released: list[int] = []  # slots that no batch has reported yet
        self._num_in_flight = 0  # batches
        self.num_preemptions = 0
        self.refused: Sequence | None = None  # the first of the queue, if the dispatcher had no place for it last time

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running(self) -> list[Sequence]:
        """In order of arrival."""
        return list(self._running)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in the queue. Raises ValueError for an id in use and for a prompt that fills the context."""
        if sequence.id in self._unfinished:
            raise ValueError(f"id {sequence.id!r} is in use by an unfinished sequence; choose another one.")
        room = self._max_model_len - sequence.prompt_len
        if room < 1:
            raise ValueError(
                f"the prompt has {sequence.prompt_len} tokens and the context {self._max_model_len}; leave room for at "
                f"least one new token."
            )
        sequence.max_tokens = min(sequence.max_tokens, room)
        self._unfinished[sequence.id] = sequence
        self._enqueue(sequence)

    def abort(self, sequence_id: str) -> Sequence | None:
        """Finishes a sequence; None if there is none. In flight, its pages come free when its step comes back."""
        sequence = self._unfinished.pop(sequence_id, None)
        if sequence is None:
            return None
        sequence.finish_reason = "abort"
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        elif not sequence.in_flight:
            self._release(sequence)
        return sequence

    # --- the next step ------------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next micro-batch, or None when nothing can run now: call it until then.

        It has no rows where everybody waits for lanes that move: their pages go with steps.
        """
        if self._num_in_flight == self._num_stages:
            return None
        rows = self._decodes()
        rows += self._chunks(self._running_prefills(len(rows)), rows)
        admitted = self._admit(rows)
        rows += self._chunks([sequence for sequence, _ in admitted], rows)
        if not rows and (self._num_in_flight or not self._relief.is_busy):
            assert self._num_in_flight or not self.has_work, "an empty fleet has no place for a sequence that waits"
            return None
        for row in rows:
            row.sequence.in_flight = True
        self._num_in_flight += 1
        released, self._released = self._released, []
        return Batch(rows=rows, admitted=admitted, released=released)

    def _decodes(self) -> list[Row]:
        """Once more if all of them waited and the last one started over: its pages are free by now."""
        rows: list[Row] = []
        before = -1
        while not rows and before != self.num_preemptions:
            before = self.num_preemptions
            rows = self._decodes_with_pages()
        return rows

    def _decodes_with_pages(self) -> list[Row]:
        rows: list[Row] = []
        limit = min(_share(len(self._running), self._num_stages), self._token_budget)
        for sequence in [s for s in self._running if not s.in_flight and not s.is_prefilling]:
            if len(rows) == limit:
                break
            if sequence.slot >= 0 and self._reserve_next(sequence):  # no slot: preempted for an earlier one
                rows.append(Row(sequence=sequence, start=sequence.num_computed, count=1))
        return rows

    def _running_prefills(self, num_rows: int) -> list[Sequence]:
        places = _share(len(self._running), self._num_stages) - num_rows
        return [s for s in self._running if s.is_prefilling and not s.in_flight][: max(0, places)]

    def _chunks(self, sequences: list[Sequence], rows: list[Row]) -> list[Row]:
        """The next prompt tokens of `sequences`, as many as fit into the budget beside `rows`."""
        chunks: list[Row] = []
        budget = self._budget_beside(rows)
        for sequence in sequences:
            if budget == 0:
                break
            count = min(budget, sequence.prefill_len - sequence.num_computed)
            chunks.append(Row(sequence=sequence, start=sequence.num_computed, count=count))
            budget -= count
        return chunks

    def _admit(self, rows: list[Row]) -> list[tuple[Sequence, Placement]]:
        """Gives the first ones of the queue a slot, lanes and the pages of their prompts. Nobody overtakes."""
        candidates = self._candidates(rows)
        placements = self._dispatcher.assign(candidates, self._cache.view()) if candidates else []
        self.refused = candidates[0] if placements and placements[0] is None else None
        admitted: list[tuple[Sequence, Placement]] = []
        for sequence, placement in zip(candidates, placements, strict=True):
            if placement is None:
                break
            sequence.slot = self._free_slots.pop()
            shortage = self._cache.admit(sequence.slot, placement, sequence.prefill_len)
            assert shortage is None, f"the dispatcher promised pages that are not there: {shortage}"
            insort(self._running, sequence, key=_ARRIVAL)
            admitted.append((sequence, placement))
        del self._waiting[: len(admitted)]
        return admitted

    def _candidates(self, rows: list[Row]) -> list[Sequence]:
        """Those of the queue that slots, this micro-batch's share of sequences and its budget allow."""
        acceptable = min(len(self._waiting), len(self._free_slots))
        places = _share(len(self._running) + acceptable, self._num_stages) - len(rows)
        budget = self._budget_beside(rows)
        candidates: list[Sequence] = []
        for sequence in self._waiting[: max(0, min(acceptable, places))]:
            if budget <= 0:
                break
            candidates.append(sequence)
            budget -= sequence.prefill_len
        return candidates

    def _budget_beside(self, rows: list[Row]) -> int:
        return self._token_budget - sum(row.count for row in rows)

    # --- when pages run out -------------------------------------------------------------------------------------------

    def _reserve_next(self, sequence: Sequence) -> bool:
        """Pages for one more token; lanes of others move away, or others start over. False: not in this step."""
        while (shortage := self._cache.reserve(sequence.slot, sequence.num_computed + 1)) is not None:
            lacking = self._relief.make_room(shortage.missing, self._running)
            if not lacking:
                return self._cache.reserve(sequence.slot, sequence.num_computed + 1) is None
            victim = self._victim(sequence, lacking)
            if victim is not None:
                self._preempt(victim)
            if victim in (None, sequence):
                return False
        return True

    def _victim(self, sequence: Sequence, pools: Collection[PoolId]) -> Sequence | None:
        """The latest arrived sequence after `sequence` that has pages in these pools and is not in flight.

        With None `sequence` waits: for a later one in flight, or for earlier ones to finish, which never wait for it. A
        sequence that is alone there gives way itself, since only another placement helps it.
        """
        holders = [s for s in self._running if self._cache.is_in(s.slot, pools)]
        if holders == [sequence]:
            return sequence
        later = holders[holders.index(sequence) + 1 :]
        return next((s for s in reversed(later) if not s.in_flight), None)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._enqueue(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.num_computed, sequence.prefill_len = 0, len(sequence.token_ids)
        insort(self._waiting, sequence, key=_ARRIVAL)

    def _release(self, sequence: Sequence) -> None:
        self._cache.release(sequence.slot)
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._released.append(sequence.slot)
        sequence.slot = -1

    # --- what came back -----------------------------------------------------------------------------------------------

    def on_tokens(self, batch: Batch, tokens: Iterable[int], invalid: Collection[int] = ()) -> list[NewToken]:
        """Takes over a computed batch: `tokens` for its rows that sample, in order; `invalid`: indices among these.

        Returns one entry per token. Sequences that finish (also those aborted meanwhile) leave and free their pages.
        """
        self._num_in_flight -= 1
        drawn = iter(tokens)
        new_tokens: list[NewToken] = []
        for row in batch.rows:
            sequence = row.sequence
            sequence.in_flight = False
            sequence.num_computed = row.start + row.count
            if not row.is_decode and not sequence.is_prefilling:
                self._cache.end_prefill(sequence.slot)
            if row.samples:
                token = self._accept(sequence, next(drawn), valid=len(new_tokens) not in invalid)
                new_tokens.append(NewToken(sequence=sequence, token=token))
            if sequence.finish_reason is not None:
                self._release(sequence)
        assert next(drawn, None) is None, "more tokens than rows that sample"
        return new_tokens

    def _accept(self, sequence: Sequence, token: int, *, valid: bool) -> int | None:
        """Appends a token, unless there is none to be had, and finishes the sequence if that was its last one."""
        if sequence.finish_reason is not None:  # aborted
            return None
        if valid:
            sequence.token_ids.append(token)
        if not valid:
            sequence.finish_reason = "error"
        elif token in sequence.stop_ids:
            sequence.finish_reason = "stop"
            sequence.stop_reason = token if token in sequence.params.stop_token_ids else None
        elif sequence.num_output >= sequence.max_tokens:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            del self._unfinished[sequence.id]
        return token if valid else None


def _share(count: int, num_stages: int) -> int:
    """An equal share of each micro-batch, rounded up."""
    return -(-count // num_stages)
