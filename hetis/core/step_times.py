"""Where the time of a step goes on one rank, as it reports it with every step."""

from enum import IntEnum

import msgspec


class Activity(IntEnum):
    """What a rank does at a time. Exactly one of these at every moment of a step."""

    OTHER = 0  # planning, embedding, logits, sampling
    DENSE = 1  # projections, MLP, norms, and sums over tensor-parallel ranks
    SEND = 2  # packing messages, and waiting for room on a link
    APPEND = 3  # new K and V into pages
    ATTENTION = 4  # decode attention
    PROMPT = 5  # attention of prompt chunks
    MIGRATION = 6  # pages of lanes on the move
    WAIT = 7  # for a message of a lane's other end
    STAGE = 8  # waiting for the stage before, and handing on to the next one

    @property
    def label(self) -> str:
        return self.name.lower()


class StageTimes(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part in one stage of one step. Times are microseconds, over all layers of the stage."""

    stage: int
    heads: int  # query heads of decode lanes
    kv_tokens: float  # that attention reads in a layer, over these lanes; averaged over the layers, for windows
    activity_us: list[float]  # by `Activity`
    round_trip_us: dict[int, float] = {}  # worker -> of a layer's message, on average; only where the primary waited
    num_page_layers: int = 0  # pages that were on the move, times layers; sent and received
    trace: bytes = (
        b""  # float64 [n, 3] (activity, begin, end) in seconds since the epoch; only where a trace is written
    )
