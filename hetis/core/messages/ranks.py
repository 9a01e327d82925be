"""Messages between the driver and the ranks, except the step command."""

from typing import Literal

from hetis.core.device_info import DeviceInfo, RankStats
from hetis.core.measurements import AttentionSample, DenseSample, PrefillSample, TransferSample
from hetis.core.messages.base import Message
from hetis.core.model_spec import ModelSpec
from hetis.core.plan import Plan
from hetis.core.step_times import StageTimes
from hetis.core.token_logprobs import TokenLogprobs

# --- rank -> driver ---------------------------------------------------------------------------------------------------


class Hello(Message):
    info: DeviceInfo


class Ready(Message):
    rank: int


class Measured(Message):
    """Answer to `Measure` and `MeasureLink`. The samples of a link come from its primary; its worker has none."""

    rank: int
    seconds: float  # that it took
    read_bytes_per_us: float = 0.0
    attention: list[AttentionSample] = []
    dense: list[DenseSample] = []
    prefill: list[PrefillSample] = []
    request: list[TransferSample] = []  # primary to worker
    reply: list[TransferSample] = []


class StepResult(Message):
    """Tokens of a step's sampling rows in order, from the sampling rank (index 0 of the last stage)."""

    step: int
    tokens: list[int]
    errors: dict[int, str] = {}  # index among sampling rows -> why it has no token; its entry in `tokens` is void
    logprobs: list[TokenLogprobs | None] = []  # per sampling row, empty when none asks for them
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # row index -> its positions in this step


class StepTimes(Message):
    """Times of a finished step, from every rank."""

    rank: int
    step: int
    num_decodes: int  # decode rows; with 0 of these and of prompt tokens, only pages were transferred
    num_prompt_tokens: int
    stages: list[StageTimes]  # one for each stage that has finished the step: those of a worker do so one by one


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
    step: int  # the last one that it has finished, in all of its stages; -1 before the first


class Publish(Message):
    """A value for other ranks, like the address of one end of a link. Each key is written once."""

    key: str
    value: bytes


class LookUp(Message):
    """Answered with `Published` as soon as a rank has published the key."""

    key: str


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
    max_transfer_pages: int  # of migrating lanes, that one link carries in a step each way
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


class StatsQuery(Message):
    """Answered with `Stats`."""


class Published(Message):
    key: str
    value: bytes


class Shutdown(Message):
    """End in good order."""
