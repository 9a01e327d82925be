"""Raw measurements by ranks, to which profiles are fitted. Times are microseconds for one layer, or for one message."""

from typing import NamedTuple


class AttentionSample(NamedTuple):
    """One call of decode attention."""

    heads: int  # query heads, over all lanes
    kv_bytes: int  # that they read
    time_us: float


class DenseSample(NamedTuple):
    """A layer without attention. Ranks know the tokens; bytes and operations follow from the model."""

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
