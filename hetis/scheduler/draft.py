"""A micro-batch while it is being filled: what it holds, and what it still takes."""

from hetis.core.batch import Row
from hetis.core.placement import Placement, PoolId
from hetis.core.request import Sequence


class Draft:
    """A micro-batch that is being filled."""

    def __init__(self, budget: int, max_num_seqs: int, places: int) -> None:
        self.budget = budget  # tokens that it still takes
        self.decode_budget = min(budget, max_num_seqs)  # of them, in decode: ranks have room for so many lanes
        self.places = places  # rows that it still takes
        self.decodes: list[Row] = []
        self.prompts: list[Row] = []
        self.admitted: list[tuple[Sequence, Placement]] = []
        self.closed: set[PoolId] = set()  # pools that lack pages for an earlier sequence than those that follow

    def add(self, sequence: Sequence) -> None:
        """Its next tokens, as many as the budgets allow: of the prompt, and those after it.

        A sequence that starts over has both, in two rows: a layer appends the K and V of all tokens before any attends.
        """
        before = self.budget
        start, prompt_len = sequence.num_computed, sequence.prompt_len
        if start < prompt_len:
            start = self._add_row(self.prompts, sequence, start, min(prompt_len - start, self.budget))
        if start >= prompt_len:
            self._add_row(self.decodes, sequence, start, min(len(sequence.token_ids) - start, self.decode_budget))
        self.places -= self.budget < before

    def _add_row(self, rows: list[Row], sequence: Sequence, start: int, count: int) -> int:
        """Where the next row begins."""
        if count:
            rows.append(Row(sequence=sequence, start=start, count=count))
            self.budget -= count
            spent = count if rows is self.decodes else 0
            self.decode_budget = min(self.decode_budget - spent, self.budget)
        return start + count
