"""What one step computes: rows of new tokens, decode rows first."""

import msgspec

from hetis.core.placement import Placement
from hetis.core.request import Sequence


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """`count` new tokens of a sequence, at positions `start .. start + count - 1`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_decode(self) -> bool:
        """Attention of decode rows runs where the lanes live, that of prefill rows on the primaries.

        They have one token, or several of a sequence that starts over.
        """
        return self.start >= self.sequence.prompt_len

    @property
    def samples(self) -> bool:
        """Whether the row reaches the end of the known tokens, so that a new one is drawn."""
        return self.start + self.count == len(self.sequence.token_ids)


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
    """What a row that samples brought: `sequence.finish_reason` says whether it was the last one."""

    sequence: Sequence
    token: int | None  # None: aborted meanwhile, or the logits were not finite (finish_reason "error")
