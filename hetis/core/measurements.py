"""What ranks measure, before anything is fitted to it. Times are microseconds for one layer, or for one message."""

from typing import NamedTuple


class AttentionSample(NamedTuple):
    """Decode attention of one call."""

    heads: int  # query heads, over all lanes
    kv_bytes: int  # that they read
    time_us: float


class DenseSample(NamedTuple):
    """Everything in a layer but attention. Ranks know tokens; bytes and operations follow from the model."""

    num_tokens: int
    time_us: float


class PrefillSample(NamedTuple):
    """Attention of prompt chunks."""

    pairs: int  # of a query head and a token that it sees
    time_us: float


class TransferSample(NamedTuple):
    """One message, one way."""

    num_bytes: int
    time_us: float
