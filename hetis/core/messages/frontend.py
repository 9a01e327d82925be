"""Messages between front ends and the driver."""

import msgspec

from hetis.core.attention_rates import AttentionRates
from hetis.core.messages.base import Message
from hetis.core.messages.observe import EngineStatus
from hetis.core.profile import FleetProfile
from hetis.core.sampling_params import SamplingParams
from hetis.core.token_logprobs import TokenLogprobs

# --- front end -> driver ----------------------------------------------------------------------------------------------


class Attach(Message):
    """First message of a front end; answered with `EngineReady` as soon as the fleet is up.

    Its sequences are aborted when the process `pid`, of this host, ends.
    """

    pid: int


class Detach(Message):
    """Last message of a front end: its unfinished sequences are aborted."""


class AddRequest(Message):
    """One sequence (a request with n > 1 is sent as n of these), answered with `Outputs` until it is finished.

    The front end keeps the sequence's record: with the output so far the same sequence is continued, on this driver or
    on another one, and every later token is the one that would have come without a break.
    """

    id: str  # unique among the unfinished sequences of the front end
    token_ids: list[int]  # prompt, then the output so far
    prompt_len: int
    seed: int  # of its random numbers, 64 bits, signed; `params.seed` is not used
    params: SamplingParams


class AbortRequest(Message):
    """Answered with the finish reason "abort", also where there is no such sequence (any more)."""

    id: str


class FleetQuery(Message):
    """Answered with `FleetStats`."""


class ProfileQuery(Message):
    """Answered with `ProfileReport`."""


# --- driver -> front end ----------------------------------------------------------------------------------------------


class Measuring(Message):
    """Devices and links are measured before the fleet is up: how many measurements are done."""

    done: int
    total: int


class EngineReady(Message):
    max_model_len: int
    vocab_size: int
    ledger: str  # the memory table, printable
    eos_token_ids: list[int]


class TokenOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """New tokens of one sequence."""

    id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # why, when finish_reason is "error"
    # with the first token only, in seconds
    queued_s: float | None = None  # from its arrival at the engine to its first placement
    prefill_s: float | None = None  # from there to its first token


class Outputs(Message):
    outputs: list[TokenOutput]
    status: EngineStatus | None = None  # now and then, while steps run


class ProfileReport(Message):
    """What the cost model starts from."""

    profile: FleetProfile | None  # None: nothing was measured, since no placement depends on speeds
    sources: dict[int, str] = {}  # rank -> where its numbers come from, printable
    devices: dict[int, str] = {}  # rank -> the device it took, like "cuda:0"


class DeviceModel(AttentionRates, frozen=True, kw_only=True):
    """Current prediction of a rank's decode attention.

    `factors`: ratio of the current cost to the profile's, per head, per byte, and constant.
    """

    factors: list[float]
    link_constant_us: float  # 0 for primaries
    link_us_per_head: float


class MemberStats(msgspec.Struct, kw_only=True):
    """One line of the fleet table."""

    rank: int
    role: str
    device: str
    heads: int  # query heads held now, over all sequences, summed over stages
    heads_peak: int
    pages_used: int
    pages_total: int
    pages_peak: int
    attention_seconds: float
    attention_share: float  # of all attention time in the fleet
    bytes_sent: dict[str, int]
    bytes_received: dict[str, int]
    model: DeviceModel | None  # None where speeds are not followed
    predicted_us: float  # decode attention of a layer, mean over the steps in which the rank had heads
    measured_us: float


class FleetStats(Message):
    members: list[MemberStats]
    num_steps: int
    num_preemptions: int
    num_dispatches: int  # sequences that were placed
    num_rebalances: int  # decisions to move lanes for the sake of balance
    num_reliefs: int  # decisions to move lanes because pages ran out
    num_migrations: int  # lanes that have moved
    migrated_bytes: int


class Refused(Message):
    """Answer to frames that are no message of a front end, and to one that cannot be obeyed. All front ends go on."""

    reason: str


class EndRequested(Message):
    """A launcher, such as torchrun, wants the fleet to end. The root ends it, within some seconds."""

    reason: str


class EngineDead(Message):
    reason: str
