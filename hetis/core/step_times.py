"""The time of a step on one rank, by activity, as the rank reports it after every step."""

from enum import IntEnum

import msgspec


class Activity(IntEnum):
    """Activities of a rank: exactly one of these at every moment of a step."""

    OTHER = 0  # planning, embedding, logits, sampling
    DENSE = 1  # projections, MLP, norms, and sums over tensor-parallel ranks
    SEND = 2  # packing messages, and waiting for room on a link
    APPEND = 3  # new K and V into pages
    ATTENTION = 4  # decode attention
    PROMPT = 5  # attention of prompt chunks
    MIGRATION = 6  # transferring pages of migrating lanes
    WAIT = 7  # for a message from the other end of a link
    STAGE = 8  # waiting for the stage before, and sending to the next one

    @property
    def label(self) -> str:
        return self.name.lower()


class StageTimes(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part in one stage of one step. Times are microseconds, over all layers of the stage."""

    stage: int
    heads: int  # query heads of decode lanes
    kv_tokens: float  # that attention reads in a layer, over these lanes; averaged over the layers, for windows
    activity_us: list[float]  # by `Activity`
    round_trip_us: dict[int, float] = {}  # worker -> mean over layers of message and reply; where the primary waited
    num_page_layers: int = 0  # pages transferred for migrations, sent and received, times layers
    trace: bytes = b""  # float64 [n, 3] (activity, begin, end), seconds since the epoch; only where a trace is written
