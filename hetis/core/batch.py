"""What one step computes: rows of new tokens, decode rows first."""

import msgspec

from hetis.core.placement import Placement
from hetis.core.request import Sequence

YOURS = -1  # in place of a token that the driver does not know yet: the last one that the rank has drawn for the slot


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """`count` new tokens of a sequence, at positions `start .. start + count - 1`."""

    sequence: Sequence
    start: int
    count: int
    samples: bool  # whether the row reaches the end of the sequence's tokens, so that it draws a new one

    @property
    def token_ids(self) -> list[int]:
        """The new tokens; `YOURS` for one that a step in flight draws."""
        known = self.sequence.token_ids[self.start : self.start + self.count]
        return known if len(known) == self.count else [*known, YOURS]

    @property
    def is_decode(self) -> bool:
        """Attention of decode rows runs where the lanes live, that of prefill rows on the primaries.

        A decode row has one token, or several of a preempted sequence that recomputes its output.
        """
        return self.start >= self.sequence.prompt_len

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the row's prompt tokens are asked for and still to be delivered, which happens
        with the first output token."""
        sequence = self.sequence
        is_wanted = sequence.params.prompt_logprobs is not None and sequence.num_output == 0
        return is_wanted and self.start < sequence.prompt_len

    @property
    def prompt_targets(self) -> list[int]:
        """The prompt token that follows each of the row's; nothing for the prompt's last token and what comes after."""
        stop = min(self.start + self.count + 1, self.sequence.prompt_len)
        return self.sequence.token_ids[self.start + 1 : stop]


class Batch(msgspec.Struct, kw_only=True):
    """One step (one micro-batch of the pipeline)."""

    rows: list[Row]  # decode rows first
    admitted: list[tuple[Sequence, Placement]]  # sequences that got a slot in this step
    released: list[int]  # slots freed since the last step (finished, aborted, preempted)

    @property
    def num_decode(self) -> int:
        return sum(row.is_decode for row in self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)


class NewToken(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a sampling row: `sequence.finish_reason` says whether it was the last one."""

    sequence: Sequence
    token: int | None  # None: it could not be drawn (finish_reason "error")
