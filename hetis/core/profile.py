"""Measured speeds of devices and links, as coefficients of the formulas that predict times.

Times are microseconds (`_us`) for one layer. Heads are query heads. Bytes of KV are those of one layer, over all lanes.
`accuracy` is that of predictions for points left out of the fit (1 is perfect). Bounds are checked where a profile is
decoded: they leave room for any device, and keep sums and products finite.
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

LEAST_US = 1e-12  # of all terms of a prediction together: times of 0 cannot be compared, nor corrected by a factor

_NAMES_IN_FILES = {"us_per_head": "a_us_per_head", "us_per_byte": "b_us_per_byte", "constant_us": "c_us"}  # the paper's


class ProfileKey(msgspec.Struct, frozen=True, kw_only=True, order=True, forbid_unknown_fields=True):
    """All that measurements of a device depend on."""

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
        """A readable name that is different for every key."""
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
    """Non-attention time of a layer: fixed_us + max(time to read the weights, time to compute the tokens).

    Where primaries split a layer, the sums over them are included: a primary cannot be measured without the others.
    """

    fixed_us: Amount
    us_per_weight_byte: Amount
    us_per_flop: Amount
    accuracy: Accuracy = 0.0

    def time_us(self, weight_bytes: float, flops: float) -> float:
        """`flops`: 2 per weight and token, of all tokens."""
        return self.fixed_us + max(self.us_per_weight_byte * weight_bytes, self.us_per_flop * flops)


class PrefillProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Attention of prompt chunks: fixed_us + us_per_pair * pairs, a pair being one query head that sees one token."""

    fixed_us: Amount
    us_per_pair: Amount
    accuracy: Accuracy = 0.0

    def time_us(self, pairs: float) -> float:
        return self.fixed_us + self.us_per_pair * pairs if pairs else 0.0


class LayerShare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of a layer that a primary holds."""

    num_ranks: Count  # that split the layer
    num_groups: Annotated[int, Meta(ge=0, le=1 << 62)]  # head groups, of this rank
    num_weights: Count  # values, of this rank


class LayerProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times of a primary in a layer, except decode attention. Valid for one share of the layers of one model."""

    share: LayerShare
    dense: DenseProfile
    prefill: PrefillProfile | None  # None without head groups

    def __post_init__(self) -> None:
        if (self.prefill is None) != (self.share.num_groups == 0):
            found = "no prefill" if self.prefill is None else "a prefill"
            raise ValueError(f"a rank with {self.share.num_groups} head groups has {found}; those with 0 have none")


class KindProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All measurements of devices of one kind, as the profile cache keeps them."""

    key: ProfileKey
    attention: AttentionProfile
    read_bytes_per_us: Amount  # sustained
    layers: tuple[LayerProfile, ...] = ()  # of different shares


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measurements of one rank of a fleet."""

    key: ProfileKey
    attention: AttentionProfile
    read_bytes_per_us: Amount
    usable_bytes: Annotated[int, Meta(ge=0, le=1 << 62)]
    layer: LayerProfile | None = None  # of a primary


class TransferProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One direction of a link: alpha_us + beta_us_per_byte * bytes, equation (4) of the paper, and one term more.

    Large messages do not stay in the processors' caches between sender and receiver: from `large_bytes` on their bytes
    take longer, by up to `more_us_per_byte` at twice that size and beyond. A fit leaves both at 0 where a straight line
    is enough. Only the messages of prompts are so large.
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
    """All that the cost model starts from. `--profile FILE` reads it, `hetis profile --output FILE` writes it."""

    devices: Mapping[Rank, DeviceProfile]
    links: tuple[LinkProfile, ...] = ()
