"""The lanes of one sequence and their pages, pool by pool.

A lane is the KV of one sequence and one head group in one stage. Its index `slot * G + group` is its line in page
tables.

Letters: U lanes of one sequence in one pool, K pages, W pages of a lane.
"""

import numpy as np
from numpy.typing import NDArray

from hetis.core.placement import Move, PoolId

Int32 = NDArray[np.int32]


class PoolLanes:
    """Lanes of one sequence in one pool and their pages."""

    def __init__(self, pool: PoolId, lanes: list[int]) -> None:
        self.pool = pool
        self.lane_U = np.asarray(lanes, dtype=np.int32)
        self.blocks: list[Int32] = []  # [U, K] each, in the order of the tokens

    @property
    def num_lanes(self) -> int:
        return len(self.lane_U)

    @property
    def num_pages(self) -> int:
        """Of all lanes together."""
        return sum(block.size for block in self.blocks)

    @property
    def pages(self) -> Int32:
        """[U, W]"""
        return np.concatenate([np.empty((self.num_lanes, 0), dtype=np.int32), *self.blocks], axis=1)

    def remove(self, lane: int) -> Int32:
        """Takes one lane out and returns its pages [W]."""
        keep = self.lane_U != lane
        assert keep.sum() == self.num_lanes - 1, f"lane {lane} is not in {self.pool}"
        pages: Int32 = self.pages[~keep].ravel()
        self.lane_U, self.blocks = self.lane_U[keep], [block[keep] for block in self.blocks]
        return pages


class Transit:
    """A migrating lane: it lives at its source, and has pages at its target that are filled step by step."""

    def __init__(self, move: Move, part: PoolLanes) -> None:
        self.move, self.part = move, part
        self.num_sent = 0  # pages that are at the target, or on their way in a step
        self.is_complete = False  # with all its tokens, those of the step in which the last page goes included


class SequenceLanes:
    """All lanes of one sequence. They have the same length, so they grow together: one new page each, or none.

    Staging does not grow: it holds what was known at admission, and is free when the prompt's last step has come back,
    which may be after the pages of the next token were allocated.
    """

    def __init__(self, owned: list[PoolLanes], staging: list[PoolLanes]) -> None:
        self.owned = owned  # where the lanes live
        self.staging = staging  # on the homes of lanes that live elsewhere, until the end of prefill
        self.transits: list[Transit] = []  # in the order of their start
        self.num_pages = 0  # of each lane; staging may have fewer
        self.num_tokens = 0

    @property
    def growing(self) -> list[PoolLanes]:
        """All that grows with the sequence."""
        return [*self.owned, *(transit.part for transit in self.transits)]

    @property
    def parts(self) -> list[PoolLanes]:
        """All that has pages."""
        return [*self.growing, *self.staging]

    def owner_of(self, lane: int, stage: int) -> PoolLanes:
        """The part in which a lane lives."""
        return next(part for part in self.owned if part.pool.stage == stage and lane in part.lane_U)
