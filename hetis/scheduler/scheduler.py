"""The scheduler: which tokens the next step computes. Continuous batching, chunked prefill, first come first served.

A micro-batch is filled in order of arrival: sequences admitted before (decode and prefill alike), then waiting ones.
Admission allocates the pages of the whole prompt, staging included, so only decode exhausts pools. Lanes then migrate
if they can (`Relief`); else the latest arrival with pages there is preempted, or waited for while it is in flight.

Preemption by recompute: a preempted sequence loses its pages, keeps its tokens, and is admitted again later. Its prompt
is then prefilled and its output decoded, many tokens at once, because the two kinds of attention may round differently:
on CPUs its logits keep their bits. Where the budgets allow, one step does both, with a prefill row and a decode row.

Fairness: no sequence allocates pages that an earlier arrival lacks. A preempted sequence is admitted again in order of
arrival, before later ones grow; of these as many are preempted as its pages require. So beside a waiting sequence a
later one fills at most the pages that it holds, and the earliest sequence waits only for steps in flight and for
migrating lanes. tests/scheduler/test_fairness.py derives the bound.

With n > 1 pipeline stages at most n micro-batches are in flight, and a sequence is in at most one of them. Each takes
at most an n-th of the sequences and of the token budget, so that every stage has work.

One step ahead: with one stage and depth 1 the next step is scheduled while one runs, so two are in flight, and a
sequence may be in both. Ranks obey commands in order, and steps come back in order. What holds of steps in flight:

- The second one computes the token that the first one draws: its row says `YOURS`, which is the rank's last token of
  the slot. So `Sequence.num_tokens` counts tokens that are being drawn, and rows begin at `num_scheduled`.
- A sequence that ends by its length with a step in flight is not scheduled again (`Sequence.is_complete`).
- One that ends otherwise (stop token, abort, error) keeps slot and pages until no step in flight has a row of it; what
  such a row draws is discarded. So a slot, a page, and all that ranks keep of a slot never pass to another sequence
  while a command in flight names them.
- Nothing is preempted in flight: the victim gets no further rows, until it is not in flight. Nor is anything preempted
  or migrated for pages that come free with steps in flight.
- Staging comes free with the step that completes the prompt, though the next step may have a decode row already.
- Migrations are committed in the order of commands: a lane that is complete with step n lives at its target in step
  n + 1, which may be sent before step n comes back. A page of its source that step n + 1 reuses has been read by then.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable

from hetis.cache.cache_manager import CacheManager
from hetis.core.batch import Batch, NewToken
from hetis.core.placement import Dispatcher, NoRelief, PoolId, Relief
from hetis.core.request import Sequence, arrival_of
from hetis.scheduler.batch_builder import BatchBuilder
from hetis.scheduler.drawn_tokens import accept
from hetis.scheduler.victims import Victims


class Scheduler:
    """Owner of all unfinished sequences and of their slots, from `add` until they finish."""

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
        depth: int = 0,
    ) -> None:
        """`max_num_batched_tokens`: limit of all micro-batches in flight together. `max_model_len`: limit of prompt and
        output of a sequence; a fleet that runs it alone must have pages for it. `depth`: 0 or 1 steps to schedule ahead
        of the one that runs; of no effect where several stages have micro-batches in flight."""
        assert depth in (0, 1), f"rows are known one step ahead, not {depth}"
        self._cache, self._dispatcher, self._relief = cache, dispatcher, relief or NoRelief()
        self._max_num_seqs, self._max_model_len, self._num_stages = max_num_seqs, max_model_len, num_stages
        self._depth = depth if num_stages == 1 else 0
        self._token_budget = _share(max_num_batched_tokens, num_stages)
        self._waiting: list[Sequence] = []  # in order of arrival
        self._running: list[Sequence] = []  # in order of arrival
        self._victims = Victims(cache, dispatcher, self._running)
        self._unfinished: dict[str, Sequence] = {}
        self._free_slots = list(reversed(range(max_num_seqs)))
        self._released: list[int] = []  # slots to report as free with the next batch
        self._num_in_flight = 0  # batches
        self.num_preemptions = 0
        self.preempted: list[Sequence] = []  # by the last `schedule`
        self.refused: Sequence | None = None  # head of the queue, if the last `schedule` found no placement for it

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """Admitted sequences in order of arrival."""
        return list(self._running)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in the queue. It may have output from before, which is recomputed.

        Raises ValueError for an id in use, for a prompt that fills the context, and for a complete output.
        """
        if sequence.id in self._unfinished:
            raise ValueError(f"id {sequence.request_id!r} is in use by an unfinished request; choose another one.")
        room = self._max_model_len - sequence.prompt_len
        if room < 1:
            raise ValueError(
                f"the prompt has {sequence.prompt_len} tokens and the context {self._max_model_len}; shorten it by at "
                f"least {1 - room}."
            )
        sequence.max_tokens = min(sequence.max_tokens, room)
        if sequence.num_output >= sequence.max_tokens:
            raise ValueError(
                f"the output is complete: it has {sequence.num_output} tokens of at most {sequence.max_tokens}."
            )
        self._unfinished[sequence.id] = sequence
        self._enqueue(sequence)

    def abort(self, sequence_id: str) -> Sequence | None:
        """Finishes a sequence and returns it (None: unknown id). Its pages are freed when it is not in flight."""
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
        """Returns the next micro-batch, or None when nothing can run now; call it until it returns None.

        Without rows it transfers pages only: every sequence waits for lanes that migrate.
        """
        self.preempted.clear()
        if self._num_in_flight == self._num_stages + self._depth:
            return None
        self.refused = None
        sequences = self._admitted_before()
        builder = BatchBuilder(self._token_budget, self._max_num_seqs, _share(len(sequences), self._num_stages))
        self._continue(sequences, builder)
        if not builder.reserved:
            self._admit(self._candidates(builder), builder)
        rows = builder.decodes + builder.prefills
        if not rows and (self._num_in_flight or not self._relief.is_busy):
            assert self._num_in_flight or not self.has_work, "an empty fleet has no room for a waiting sequence"
            return None
        for row in rows:
            sequence = row.sequence
            sequence.in_flight += 1
            sequence.num_scheduled = max(sequence.num_scheduled, row.start + row.count)
            sequence.num_tokens += row.samples
        self._num_in_flight += 1
        released, self._released = self._released, []
        return Batch(rows=rows, admitted=builder.admitted, released=released)

    def _continue(self, sequences: list[Sequence], builder: BatchBuilder) -> None:
        """Adds the next tokens of `sequences`, which were admitted before and are in order of arrival."""
        for sequence in sequences:
            if not builder.sequence_budget or not builder.token_budget:
                break
            if sequence.in_flight and (not self._depth or sequence.is_complete or sequence.arrival in builder.awaited):
                continue
            if sequence.slot >= 0 and self._allocate_next(sequence, builder):
                builder.add(sequence)
            elif sequence.slot < 0:  # preempted: before, for an earlier one in this loop, or to be placed elsewhere
                self._readmit(sequence, builder)

    def _admitted_before(self) -> list[Sequence]:
        """Running and preempted sequences in order of arrival. (A waiting one was preempted if a later one runs.)"""
        last = self._running[-1].arrival if self._running else -1
        preempted = self._waiting[: bisect_left(self._waiting, last, key=arrival_of)]
        return sorted([*preempted, *self._running], key=arrival_of) if preempted else list(self._running)

    def _candidates(self, builder: BatchBuilder) -> list[Sequence]:
        """The head of the queue, as far as free slots, this micro-batch's share of sequences and its tokens allow."""
        acceptable = min(len(self._waiting), len(self._free_slots))
        share = _share(len(self._running) + acceptable, self._num_stages) - builder.num_sequences
        budget = builder.token_budget
        candidates: list[Sequence] = []
        for sequence in self._waiting[: max(0, min(acceptable, share))]:
            if budget <= 0:
                break
            candidates.append(sequence)
            budget -= len(sequence.token_ids)
        return candidates

    def _admit(self, candidates: list[Sequence], builder: BatchBuilder) -> None:
        """Gives candidates a slot, lanes, the pages of their tokens and rows, up to the first without a placement."""
        placements = self._dispatcher.assign(candidates, self._cache.view()) if candidates else []
        for sequence, placement in zip(candidates, placements, strict=True):
            if placement is None:
                break
            sequence.slot = self._free_slots.pop()
            shortage = self._cache.admit(sequence.slot, placement, len(sequence.token_ids))
            assert shortage is None, f"the dispatcher placed lanes for which there are no pages: {shortage}"
            self._waiting.remove(sequence)
            insort(self._running, sequence, key=arrival_of)
            builder.admitted.append((sequence, placement))
            builder.add(sequence)
        if placements and placements[0] is None:
            self.refused = candidates[0]

    # --- exhausted pools ----------------------------------------------------------------------------------------------

    def _allocate_next(self, sequence: Sequence, builder: BatchBuilder) -> bool:
        """Allocates pages up to the newest token of `sequence`; True if it can be in this step.

        Where pools are exhausted, lanes migrate from them or sequences are preempted, perhaps `sequence` itself.
        """
        num_tokens = sequence.num_tokens
        if builder.reserved and not builder.reserved.isdisjoint(self._cache.pools_to_grow(sequence.slot, num_tokens)):
            return False
        while (shortage := self._cache.allocate(sequence.slot, num_tokens)) is not None:
            is_freeing = self._victims.are_coming_free(shortage.missing)
            lacking = {} if is_freeing else self._relief.make_room(shortage.missing, self._running)
            if not lacking:  # enough pages are free by now, or come free
                if self._cache.allocate(sequence.slot, num_tokens) is None:
                    return True
                builder.reserved.update(shortage.missing)
                return False
            if not self._preempt_for(sequence, lacking, builder):
                return False
        return True

    def _preempt_for(self, sequence: Sequence, pools: Collection[PoolId], builder: BatchBuilder) -> bool:
        """Preempts the sequence that holds pages which `sequence` needs; False if `sequence` cannot be in this step."""
        victim = self._victims.for_pages(sequence, pools)
        if victim is not None and not victim.in_flight:
            self.preempt(victim)
            return victim is not sequence
        builder.reserved.update(self._cache.pools)
        if victim is not None:
            builder.awaited.add(victim.arrival)
        return False

    def _readmit(self, sequence: Sequence, builder: BatchBuilder) -> None:
        """Admits a preempted sequence; preempts the fewest later ones that make room for it, latest first."""
        if builder.reserved:
            return
        victims = self._victims.for_admission(sequence)
        if victims is not None:
            awaited = [victim.arrival for victim in victims if victim.in_flight]
            for victim in victims:
                if not victim.in_flight:
                    self.preempt(victim)
            if not awaited:
                self._admit([sequence], builder)
                return
            builder.awaited.update(awaited)
        self.refused = sequence
        builder.reserved.update(self._cache.pools)

    def preempt(self, sequence: Sequence) -> None:
        """Frees all pages of a running sequence that is not in flight; it waits to be recomputed."""
        assert not sequence.in_flight, "a step in flight uses its pages"
        self._release(sequence)
        self._enqueue(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.preempted.append(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.num_scheduled, sequence.num_computed, sequence.num_tokens = 0, 0, len(sequence.token_ids)
        insort(self._waiting, sequence, key=arrival_of)

    def _release(self, sequence: Sequence) -> None:
        self._cache.release(sequence.slot)
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._released.append(sequence.slot)
        sequence.slot = -1

    # --- results of a step --------------------------------------------------------------------------------------------

    def on_tokens(self, batch: Batch, tokens: Iterable[int], invalid: Collection[int] = ()) -> list[NewToken | None]:
        """Takes over a computed batch, the first of those in flight, and returns one entry per token.

        `tokens`: drawn by the rows that sample, in order; None is returned for one that is discarded, because its
        sequence had ended before. `invalid`: indices of tokens that could not be drawn. Sequences that have ended free
        their pages and slots, if they are in no other step in flight.
        """
        self._num_in_flight -= 1
        drawn = iter(tokens)
        new_tokens: list[NewToken | None] = []
        for row in batch.rows:
            sequence, stop = row.sequence, row.start + row.count
            sequence.in_flight -= 1
            sequence.num_computed = max(sequence.num_computed, stop)  # of two rows, the prefill row comes last
            if row.start < sequence.prompt_len <= stop:
                self._cache.end_prefill(sequence.slot)
        for row in batch.rows:
            sequence = row.sequence
            if row.samples:
                new = accept(sequence, next(drawn), valid=len(new_tokens) not in invalid)
                new_tokens.append(new)
                if new is not None and sequence.finish_reason is not None:
                    del self._unfinished[sequence.id]
            if sequence.finish_reason is not None and not sequence.in_flight and sequence.slot >= 0:
                self._release(sequence)
        assert next(drawn, None) is None, "more tokens than rows that sample"
        return new_tokens


def _share(count: int, num_stages: int) -> int:
    """The share of one of `num_stages` micro-batches, rounded up."""
    return -(-count // num_stages)
