"""Which tokens are computed next: continuous batching with chunked prefill, first come first served.

A micro-batch is filled in order of arrival: first the sequences that have been admitted before, decodes and prompts
alike, then waiting ones. Pages of a whole prompt, staging included, are taken at admission, so only decodes can run out
of pages. Where lanes can move, they make room. Otherwise the latest arrival among those that hold the missing pages is
preempted: it starts over later. In flight, it is waited for.

What a sequence lacks, no later one takes. A preempted sequence comes back in its turn, before later ones grow: these
are preempted as far as it needs their pages. So later arrivals that run beside a sequence that waits have no more than
the rest of their pages; the first of all waits for nothing but steps in flight and lanes on the move.

With n pipeline stages at most n micro-batches are in flight, and a sequence is in at most one of them. Each takes at
most an n-th of the sequences and of the token budget, so that every stage has work.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable
from operator import attrgetter

from hetis.cache.cache_manager import CacheManager
from hetis.core.batch import Batch, NewToken
from hetis.core.placement import Dispatcher, NoRelief, PoolId, Relief
from hetis.core.request import Sequence
from hetis.scheduler.draft import Draft

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
        self._max_num_seqs, self._max_model_len, self._num_stages = max_num_seqs, max_model_len, num_stages
        self._token_budget = _share(max_num_batched_tokens, num_stages)
        self._waiting: list[Sequence] = []  # in order of arrival
        self._running: list[Sequence] = []  # likewise
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

        It has no rows where all wait for lanes that move: their pages go with steps.
        """
        if self._num_in_flight == self._num_stages:
            return None
        self.refused = None
        sequences = self._admitted_before()
        draft = Draft(self._token_budget, self._max_num_seqs, _share(len(sequences), self._num_stages))
        self._continue(sequences, draft)
        if not draft.closed:
            self._admit(self._newcomers(draft), draft)
        rows = draft.decodes + draft.prompts
        if not rows and (self._num_in_flight or not self._relief.is_busy):
            assert self._num_in_flight or not self.has_work, "an empty fleet has no place for a sequence that waits"
            return None
        for row in rows:
            row.sequence.in_flight = True
        self._num_in_flight += 1
        released, self._released = self._released, []
        return Batch(rows=rows, admitted=draft.admitted, released=released)

    def _continue(self, sequences: list[Sequence], draft: Draft) -> None:
        """The next tokens of `sequences`, those admitted before, in order of arrival."""
        for sequence in sequences:
            if not draft.places or not draft.budget:
                break
            if sequence.in_flight:
                continue
            if sequence.slot >= 0 and self._reserve_next(sequence, draft):
                draft.add(sequence)
            elif sequence.slot < 0:  # preempted: before, for an earlier one in this loop, or to be placed anew
                self._bring_back(sequence, draft)

    def _admitted_before(self) -> list[Sequence]:
        """In order of arrival. Earlier than a running one and waiting are only those that have been preempted."""
        last = self._running[-1].arrival if self._running else -1
        returning = self._waiting[: bisect_left(self._waiting, last, key=_ARRIVAL)]
        return sorted([*returning, *self._running], key=_ARRIVAL) if returning else list(self._running)

    def _newcomers(self, draft: Draft) -> list[Sequence]:
        """Those of the queue that slots, this micro-batch's share of sequences and its budget allow."""
        acceptable = min(len(self._waiting), len(self._free_slots))
        places = _share(len(self._running) + acceptable, self._num_stages) - len(draft.decodes) - len(draft.prompts)
        budget = draft.budget
        candidates: list[Sequence] = []
        for sequence in self._waiting[: max(0, min(acceptable, places))]:
            if budget <= 0:
                break
            candidates.append(sequence)
            budget -= len(sequence.token_ids)
        return candidates

    def _admit(self, candidates: list[Sequence], draft: Draft) -> None:
        """Gives the first ones of the queue a slot, lanes, the pages of their prompts and a row. None is overtaken."""
        placements = self._dispatcher.assign(candidates, self._cache.view()) if candidates else []
        for sequence, placement in zip(candidates, placements, strict=True):
            if placement is None:
                break
            sequence.slot = self._free_slots.pop()
            shortage = self._cache.admit(sequence.slot, placement, len(sequence.token_ids))
            assert shortage is None, f"the dispatcher promised pages that are not there: {shortage}"
            self._waiting.remove(sequence)
            insort(self._running, sequence, key=_ARRIVAL)
            draft.admitted.append((sequence, placement))
            draft.add(sequence)
        if placements and placements[0] is None:
            self.refused = candidates[0]

    # --- when pages run out -------------------------------------------------------------------------------------------

    def _reserve_next(self, sequence: Sequence, draft: Draft) -> bool:
        """Pages for its newest token; lanes move away, or a sequence is preempted. False: not in this step."""
        num_tokens = len(sequence.token_ids)
        if draft.closed and not draft.closed.isdisjoint(self._cache.pools_to_grow(sequence.slot, num_tokens)):
            return False
        while (shortage := self._cache.allocate(sequence.slot, num_tokens)) is not None:
            lacking = self._relief.make_room(shortage.missing, self._running)
            if not lacking:
                if self._cache.allocate(sequence.slot, num_tokens) is None:
                    return True
                draft.closed.update(shortage.missing)
                return False
            victim = self._victim(sequence, lacking)
            if victim is None or victim.in_flight:
                draft.closed.update(self._cache.pools)
                return False
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def _victim(self, sequence: Sequence, pools: Collection[PoolId]) -> Sequence | None:
        """The sequence to preempt: the latest arrival after `sequence` that has pages in these pools.

        Where there is none, `sequence` itself, if it finds another place, should it need those of all later ones. None:
        it waits for earlier ones to finish, which never wait for it.
        """
        later = self._later_than(sequence)
        holders = [s for s in later if self._cache.is_in(s.slot, pools)]
        if holders:
            return holders[0]
        return sequence if self._has_place(sequence, [sequence, *later]) else None

    def _bring_back(self, sequence: Sequence, draft: Draft) -> None:
        """Admits a preempted sequence. Of later ones as few as possible, the latest, are preempted for its sake."""
        if draft.closed:
            return
        later = self._later_than(sequence)
        if self._has_place(sequence, later):
            count = bisect_left(range(len(later)), True, key=lambda count: self._has_place(sequence, later[:count]))
            for victim in later[:count]:
                if not victim.in_flight:
                    self.preempt(victim)
            if not any(victim.in_flight for victim in later[:count]):
                self._admit([sequence], draft)
                return
        self.refused = sequence
        draft.closed.update(self._cache.pools)

    def _later_than(self, sequence: Sequence) -> list[Sequence]:
        """Running ones, the latest first."""
        return self._running[bisect_right(self._running, sequence.arrival, key=_ARRIVAL) :][::-1]

    def _has_place(self, sequence: Sequence, without: Iterable[Sequence]) -> bool:
        """Whether `sequence` could be admitted if these were not running."""
        view = self._cache.view(without={s.slot for s in without})
        return self._dispatcher.assign([sequence], view)[0] is not None

    def preempt(self, sequence: Sequence) -> None:
        """Takes all pages from a running sequence that is not in flight; it starts over in its turn."""
        self._release(sequence)
        self._enqueue(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.num_computed = 0
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
            sequence, stop = row.sequence, row.start + row.count
            sequence.in_flight = False
            sequence.num_computed = max(sequence.num_computed, stop)  # of two rows the prompt's comes last
            if row.start < sequence.prompt_len <= stop:
                self._cache.end_prefill(sequence.slot)
        for row in batch.rows:
            sequence = row.sequence
            if row.samples:
                token = self._accept(sequence, next(drawn), valid=len(new_tokens) not in invalid)
                new_tokens.append(NewToken(sequence=sequence, token=token))
            if sequence.finish_reason is not None and sequence.slot >= 0:
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
