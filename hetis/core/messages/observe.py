"""What a front end may ask about a running fleet, and the answers: data of the driver alone, given at once.

Times are seconds on the driver's clock, the monotonic one of its process: only their differences mean something.
Counters grow from the start of the fleet, so that every front end makes rates of its own from two answers.
"""

import msgspec

from hetis.core.messages.base import Message

# Upper bounds of the buckets in `FleetCounters.step_tokens`; one more bucket holds what is above.
STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class StatusQuery(Message):
    """Answered with `EngineStatus` by the driver alone and at once, also during start-up."""


class EngineStatus(Message):
    """The engine in a few numbers; all are zero during start-up."""

    step: int = 0  # steps finished so far: progress
    num_running: int = 0  # sequences
    num_waiting: int = 0
    num_preemptions: int = 0
    kv_usage: float = 0.0  # pages in use / pages, of all ranks, 0..1
    in_flight_seconds: float = 0.0  # that ranks have been at the oldest step in flight; 0: none
    silent: list[str] = []  # one sentence for each rank that has sent no heartbeat for some seconds


class FleetSnapshotQuery(Message):
    """Answered with `FleetSnapshot` by the driver alone and at once, also during start-up."""

    max_sequences: int = 0  # most running sequences in the answer
    after_event: int = 0  # number of the last event that the front end knows; 0: none


class DeviceState(msgspec.Struct, kw_only=True):
    """One rank and its device. Seconds add up the stages of a rank, which an attention worker runs at the same time."""

    rank: int
    role: str  # as `Plan.role_of`
    device: str  # "cuda:0"
    name: str  # "NVIDIA H100"
    pages_used: int = 0
    pages_total: int = 0
    heads: int = 0  # query heads held now, over all sequences, summed over stages
    busy_seconds: float = 0.0  # in steps, without waiting
    wait_seconds: float = 0.0  # in steps, for other ranks
    attention_seconds: float = 0.0  # of `busy_seconds`
    predicted_us: float = 0.0  # decode attention of a layer, mean over the steps in which the rank had heads
    measured_us: float = 0.0
    silent_seconds: float = 0.0  # since the last heartbeat
    lanes_in: int = 0  # that have migrated to this rank
    lanes_out: int = 0  # that have migrated from it


class LinkState(msgspec.Struct, kw_only=True):
    """One direction of a link between a primary and an attention worker."""

    source: int  # rank
    target: int
    num_bytes: int  # sent so far


class SequenceState(msgspec.Struct, kw_only=True):
    """A sequence that runs."""

    id: str
    num_tokens: int  # prompt and output
    is_prefilling: bool
    owners: tuple[tuple[int, ...], ...]  # [stage][G] ranks on which its lanes live, or will after their migration


class FleetEvent(msgspec.Struct, kw_only=True):
    """A decision of the engine."""

    number: int  # from 1, without gaps
    clock: float  # driver's clock
    kind: str  # "dispatch", "rebalance", "relief", "migration" or "preemption"
    sequence_id: str  # "" for lanes that migrate
    text: str  # one line


class FleetCounters(msgspec.Struct, kw_only=True):
    """Counters since the start of the fleet."""

    num_dispatches: int = 0  # sequences that were placed
    num_rebalances: int = 0  # decisions to move lanes for the sake of balance
    num_reliefs: int = 0  # decisions to move lanes because pages ran out
    num_migrations: int = 0  # lanes that have moved
    migrated_bytes: int = 0
    step_tokens: list[int] = []  # steps by their number of new tokens, in the buckets of `STEP_TOKEN_BOUNDS`
    num_step_tokens: int = 0  # new tokens of all steps


class FleetSnapshot(Message, kw_only=True):
    """A running fleet. Without devices it has not started."""

    status: EngineStatus
    clock: float  # driver's clock
    devices: list[DeviceState] = []  # in rank order
    links: list[LinkState] = []  # as of `links_clock`
    links_clock: float | None = None  # driver's clock when the ranks were asked for the bytes; None: not yet
    num_stages: int = 0
    num_groups: int = 0  # G, head groups of the model
    sequences: list[SequenceState] = []  # the first in order of arrival
    events: list[FleetEvent] = []  # oldest first, after the one that the question names, as far as they are kept
    counters: FleetCounters
