"""Everything that crosses a process border, as tagged msgspec structs (msgpack; never pickle).

Integer arrays travel as `bytes`, little-endian int32 unless said otherwise.
"""

from typing import Literal

import msgspec

from hetis.core.attention_rates import AttentionRates
from hetis.core.device_info import DeviceInfo, RankStats
from hetis.core.measurements import AttentionSample, DenseSample, PrefillSample, TransferSample
from hetis.core.model_spec import ModelSpec
from hetis.core.plan import Plan
from hetis.core.profile import FleetProfile
from hetis.core.sampling_params import SamplingParams
from hetis.core.step_times import StageTimes
from hetis.core.token_logprobs import TokenLogprobs


class Message(msgspec.Struct, tag=True, kw_only=True):
    """Base of all messages: the tag is the class name."""


# --- rank -> driver ---------------------------------------------------------------------------------------------------


class Hello(Message):
    info: DeviceInfo


class Ready(Message):
    rank: int


class Measured(Message):
    """Answer to `Measure` and `MeasureLink`: the samples; for a link the primary has them, the worker none."""

    rank: int
    seconds: float  # that it took
    read_bytes_per_us: float = 0.0
    attention: list[AttentionSample] = []
    dense: list[DenseSample] = []
    prefill: list[PrefillSample] = []
    request: list[TransferSample] = []  # primary to worker
    reply: list[TransferSample] = []


class StepResult(Message):
    """From the sampling rank (tensor-parallel index 0 of the last stage): one token for every row that samples."""

    step: int
    tokens: bytes
    errors: dict[int, str] = {}  # index among sampled rows -> why it has no token
    logprobs: list[TokenLogprobs | None] = []  # per sampled row, empty when none asks for them
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # row index -> its positions in this step


class StepTimes(Message):
    """From every rank, after every step it has finished."""

    rank: int
    step: int
    num_decodes: int  # rows; neither these nor prompts where only pages travelled
    num_prompt_tokens: int
    stages: list[StageTimes]  # a worker's stages finish a step one by one


class Stats(Message):
    stats: RankStats


class Failure(Message):
    """Why a rank ends."""

    rank: int
    reason: str
    traceback: str = ""
    is_consequence: bool = False  # a lost connection: another process died first


class Heartbeat(Message):
    rank: int
    step: int  # the last step it finished


# --- driver -> rank ---------------------------------------------------------------------------------------------------


class Setup(Message):
    """All a rank needs to build its part. The same message goes to every rank."""

    spec: ModelSpec
    plan: Plan
    fleet: list[DeviceInfo]
    model: str | None  # directory or hub id; None: the model in the package
    revision: str | None
    load_format: str
    dtype: str
    block_size: int  # S
    num_pages: dict[int, int]  # rank -> P of each of its pools
    pages_per_haul: int  # most pages of lanes on the move that one link carries in a step, each way
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    seed: int
    enforce_eager: bool
    eos_token_ids: list[int]
    logprobs_mode: str
    step_timeout: float
    trace: bool  # ranks report every lap of a step
    progress: bool = True  # a bar on stderr while weights are loaded, if that is a terminal


class Measure(Message):
    """One part of a device's speed, to be measured before the first step. Every rank that gets it answers `Measured`.

    "attention": decode attention and reading of memory, by one rank alone. "dense": the layers' other work, and
    attention of prompts, by all primaries of a stage at once, for they add up each other's results.
    """

    part: Literal["attention", "dense"]
    seconds: float  # about how long it may take


class MeasureLink(Message):
    """A link, to be measured before the first step. For both of its ends; both answer `Measured`."""

    primary: int  # rank
    worker: int
    seconds: float  # about how long it may take


class NewSequence(msgspec.Struct, frozen=True, kw_only=True):
    slot: int
    owners: bytes  # int32 [num_stages, G]
    prompt_len: int
    seed: int
    params: SamplingParams


class PageDelta(msgspec.Struct, frozen=True, kw_only=True):
    """New entries for the page table of one pool: int32 [n, 3] of (lane row, page index, page id).

    The lane row of a sequence's head group is `slot * G + group` on every rank; a lane in prefill that lives elsewhere
    uses the same row of its home's table for its staging pages.
    """

    rank: int
    stage: int
    entries: bytes


class StepCommand(Message):
    """One step, the same bytes for every rank. Rows are in batch order, decode rows first.

    In this order: lanes that have arrived, new sequences and pages, the rows, and pages of lanes on the move, with
    what the rows append. Without rows only pages travel.
    """

    step: int
    landed: bytes  # int32 [n, 4] (slot, stage, group, rank): where a lane lives from now on
    released: list[int]
    admitted: list[NewSequence]
    pages: list[PageDelta]
    slots: bytes  # [R]
    starts: bytes  # [R] position of the first new token
    counts: bytes  # [R] number of new tokens
    num_decode: int  # rows, which come first
    tokens: bytes  # [T] ids of the new tokens
    sampled: bytes  # indices of rows that draw a token
    hauls: bytes  # int32 [n, 6] (stage, lane row, source, target, first page, stop page): see cache.migration
    prompt_logprobs: list[int] = []  # indices of rows whose prompt positions are to be scored
    prompt_targets: bytes = b""  # for those rows' new tokens in turn: the token that follows; -1 after the prompt's end


class StatsQuery(Message):
    """Answered with `Stats`."""


class Shutdown(Message):
    """End in good order."""


class Abort(Message):
    """Something died: end now. `culprits` are pids on `host`, to be killed by the ranks there."""

    reason: str
    host: str = ""
    culprits: list[int] = []


class Pong(Message):
    """Answer to a heartbeat: the driver is alive."""


# --- front end <-> driver ---------------------------------------------------------------------------------------------


class Attach(Message):
    """A front end is there; answered with `EngineReady` as soon as the fleet is up."""


class AddRequest(Message):
    """One sequence (a request with n > 1 is sent as n of these)."""

    id: str
    token_ids: list[int]
    params: SamplingParams


class AbortRequest(Message):
    id: str


class FleetQuery(Message):
    """Answered with `FleetStats`."""


class ProfileQuery(Message):
    """Answered with `ProfileReport`."""


class ProfileReport(Message):
    """What the cost model starts from."""

    profile: FleetProfile | None  # None: nothing was measured, since nothing is placed
    sources: dict[int, str] = {}  # rank -> where its numbers come from, printable
    devices: dict[int, str] = {}  # rank -> the device it took, like "cuda:0"


class Measuring(Message):
    """Devices and links are measured before the fleet is up: how many measurements are done."""

    done: int
    total: int


class EngineReady(Message):
    max_model_len: int
    vocab_size: int
    ledger: str  # the memory table, printable
    eos_token_ids: list[int]


class TokenOutput(msgspec.Struct, kw_only=True):
    """New tokens of one sequence."""

    id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # why, when finish_reason is "error"


class Outputs(Message):
    outputs: list[TokenOutput]


class DeviceModel(AttentionRates, kw_only=True):
    """How a rank's decode attention is predicted now.

    `factors`: how much longer than in its profile it takes per head, per byte, and without either.
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
    predicted_us: float  # decode attention of a layer, on average over the steps in which the rank had heads
    measured_us: float


class FleetStats(Message):
    members: list[MemberStats]
    num_steps: int
    num_preemptions: int
    num_dispatches: int  # sequences that were placed
    num_rebalances: int  # times that lanes moved for the sake of balance
    num_reliefs: int  # times that lanes moved because pages ran out
    num_migrations: int  # lanes that have moved
    migrated_bytes: int


class Refused(Message):
    """Answer to a message that is none of a front end's. The front end and all others go on."""

    reason: str


class EngineDead(Message):
    reason: str
