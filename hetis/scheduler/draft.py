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
        """Its next tokens, of the prompt or after it, as many as the budgets allow."""
        start = sequence.num_computed
        if start < sequence.prompt_len:
            count = min(sequence.prompt_len - start, self.budget)
            self.decode_budget = min(self.decode_budget, self.budget - count)
            rows = self.prompts
        else:
            count = min(len(sequence.token_ids) - start, self.decode_budget)
            self.decode_budget -= count
            rows = self.decodes
        if count:
            self.budget -= count
            self.places -= 1
            rows.append(Row(sequence=sequence, start=start, count=count))
