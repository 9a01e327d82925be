"""A micro-batch under construction: its rows, and the tokens and sequences for which it has room."""

from hetis.core.batch import Row
from hetis.core.placement import Placement, PoolId
from hetis.core.request import Sequence


class BatchBuilder:
    """Collects the rows of one micro-batch within its budgets."""

    def __init__(self, token_budget: int, max_num_seqs: int, sequence_budget: int) -> None:
        """`max_num_seqs`: most decode tokens, since buffers of ranks and links hold that many lanes per head group."""
        self.token_budget = token_budget  # tokens left
        self.decode_budget = min(token_budget, max_num_seqs)  # of them, decode tokens left
        self.sequence_budget = sequence_budget  # sequences left
        self.num_sequences = 0  # that have rows
        self.decodes: list[Row] = []
        self.prefills: list[Row] = []
        self.admitted: list[tuple[Sequence, Placement]] = []
        self.reserved: set[PoolId] = set()  # pools that lack pages for an earlier sequence: later ones may not allocate
        self.awaited: set[int] = set()  # arrivals that get no rows, because they are preempted once not in flight

    def add(self, sequence: Sequence) -> None:
        """Appends rows for the next tokens of `sequence`, as many tokens as the budgets allow.

        A recomputed sequence gets two rows if the token budget reaches beyond its prompt: a prefill row for the rest of
        the prompt and a decode row for the output that it has already. One step computes both, since every layer
        appends the K and V of all new tokens before any of them attends.
        """
        before = self.token_budget
        start, prompt_len, num_tokens = sequence.num_scheduled, sequence.prompt_len, sequence.num_tokens
        if start < prompt_len:
            start = self._add_row(self.prefills, sequence, start, min(prompt_len - start, self.token_budget))
        if start >= prompt_len:
            self._add_row(self.decodes, sequence, start, min(num_tokens - start, self.decode_budget))
        has_rows = self.token_budget < before
        self.num_sequences += has_rows
        self.sequence_budget -= has_rows

    def _add_row(self, rows: list[Row], sequence: Sequence, start: int, count: int) -> int:
        """Appends a row unless it is empty; returns the position after it."""
        if count:
            ends = start + count == sequence.num_tokens
            rows.append(Row(sequence=sequence, start=start, count=count, samples=ends))
            self.token_budget -= count
            num_decode = count if rows is self.decodes else 0
            self.decode_budget = min(self.decode_budget - num_decode, self.token_budget)
        return start + count
