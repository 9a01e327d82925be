"""What was measured of devices and links.

Times are microseconds (`_us`) for one layer. Heads are query heads. Bytes of KV are those of one layer, over all lanes.
Coefficients say how the prediction is made; `accuracy` how good it was on points left out of the fit (1 is perfect).
Bounds are checked where a profile is read: they leave room for any device, and none for what would end in infinity.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated

import msgspec
from msgspec import Meta

from hetis.core.attention_rates import AttentionRates

Amount = Annotated[float, Meta(ge=0, le=1e12)]
Accuracy = Annotated[float, Meta(le=1)]
Rank = Annotated[int, Meta(ge=0, le=1 << 31)]
Count = Annotated[int, Meta(ge=1, le=1 << 62)]

LEAST_US = 1e-12  # of all terms of a prediction together: where nothing takes time nothing can be compared or followed

_NAMES_IN_FILES = {"us_per_head": "a_us_per_head", "us_per_byte": "b_us_per_byte", "constant_us": "c_us"}  # the paper's


class ProfileKey(msgspec.Struct, frozen=True, kw_only=True, order=True, forbid_unknown_fields=True):
    """What a device's measurements hold for."""

    device: str  # "NVIDIA A100-SXM4-80GB", "AMD EPYC 9555, 16 threads"
    driver: str  # driver and library versions that matter
    dtype: str
    head_dim: Count
    queries_per_group: Count  # M
    page_size: Count  # tokens
    backend: str  # of attention: "triton", "cpu", "reference"
    enforce_eager: bool  # plain torch linears
    version: str  # of hetis

    @property
    def file_name(self) -> str:
        """Readable, and different for every key."""
        digest = sha256(msgspec.json.encode(self)).hexdigest()[:12]
        words = "".join(c if c.isalnum() else "-" for c in f"{self.device}-{self.dtype}-{self.backend}".lower())
        return f"{words}-{digest}.json"


class AttentionProfile(AttentionRates, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_NAMES_IN_FILES):
    """Decode attention of a device as measured. A fit leaves the floor at 0 where it is not needed."""

    us_per_head: Amount
    us_per_byte: Amount
    constant_us: Amount
    floor_us: Amount = 0.0
    accuracy: Accuracy = 0.0

    def __post_init__(self) -> None:
        if self.us_per_head + self.us_per_byte + self.constant_us + self.floor_us < LEAST_US:
            raise ValueError("attention that takes no time was not measured; a, b, c or the floor must be above 0")


class DenseProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything in a layer but attention: fixed_us + max(time to read the weights, time to compute the tokens).

    Where primaries split a layer, their sums are in it: they cannot be measured one by one.
    """

    fixed_us: Amount
    us_per_weight_byte: Amount
    us_per_flop: Amount
    accuracy: Accuracy = 0.0

    def time_us(self, weight_bytes: float, flops: float) -> float:
        """`flops`: of all tokens together, 2 per weight and token."""
        return self.fixed_us + max(self.us_per_weight_byte * weight_bytes, self.us_per_flop * flops)


class PrefillProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Attention of prompt chunks: fixed_us + us_per_pair * pairs, a pair being one query head that sees one token."""

    fixed_us: Amount
    us_per_pair: Amount
    accuracy: Accuracy = 0.0

    def time_us(self, pairs: float) -> float:
        return self.fixed_us + self.us_per_pair * pairs if pairs else 0.0


class LayerShare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a primary has of a layer."""

    num_ranks: Count  # that split the layer
    num_groups: Annotated[int, Meta(ge=0, le=1 << 62)]  # head groups, of this rank
    num_weights: Count  # values, of this rank


class LayerProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a primary does in a layer beside decode attention. Holds for one share of one model's layers."""

    share: LayerShare
    dense: DenseProfile
    prefill: PrefillProfile | None  # None without head groups

    def __post_init__(self) -> None:
        if (self.prefill is None) != (self.share.num_groups == 0):
            found = "no prefill" if self.prefill is None else "a prefill"
            raise ValueError(f"a rank with {self.share.num_groups} head groups has {found}; those with 0 have none")


class KindProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that was measured of devices of one kind: what the cache keeps."""

    key: ProfileKey
    attention: AttentionProfile
    read_bytes_per_us: Amount  # sustained
    layers: tuple[LayerProfile, ...] = ()  # of different shares


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank of a fleet."""

    key: ProfileKey
    attention: AttentionProfile
    read_bytes_per_us: Amount
    usable_bytes: Annotated[int, Meta(ge=0, le=1 << 62)]
    layer: LayerProfile | None = None  # of a primary


class TransferProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One direction of a link: alpha_us + beta_us_per_byte * bytes, equation (4) of the paper, and one term more.

    Large messages do not stay in the processors' caches between sender and receiver: each of their bytes takes
    `more_us_per_byte` longer, wholly from twice `large_bytes` on and in part from there. A fit leaves both at 0 where a
    straight line is enough. Only the messages of prompts are so large.
    """

    alpha_us: Amount
    beta_us_per_byte: Amount
    large_bytes: Amount = 0.0
    more_us_per_byte: Amount = 0.0
    accuracy: Accuracy = 0.0

    def time_us(self, num_bytes: float) -> float:
        large = min(max(num_bytes / self.large_bytes - 1, 0.0), 1.0) if self.large_bytes else 0.0
        return self.alpha_us + (self.beta_us_per_byte + self.more_us_per_byte * large) * num_bytes


class LinkProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Both directions between a home and an attention worker."""

    primary: Rank
    worker: Rank
    request: TransferProfile  # primary to worker
    reply: TransferProfile


class FleetProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the cost model starts from: what `--profile FILE` reads and writes."""

    devices: Mapping[Rank, DeviceProfile]
    links: tuple[LinkProfile, ...] = ()
