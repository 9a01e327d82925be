"""Stand-ins of the engine and of requests for what watches them, and a fleet of two ranks as data."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hetis.core.messages import (
    STEP_TOKEN_BOUNDS,
    DeviceState,
    EngineStatus,
    FleetCounters,
    FleetEvent,
    FleetSnapshot,
    FleetSnapshotQuery,
    LinkState,
    SequenceState,
)
from hetis.core.sampling_params import SamplingParams
from hetis.frontend.errors import EngineDeadError


def make_snapshot(seconds: float = 0.0, **changes: Any) -> FleetSnapshot:
    """A primary and a worker after so many seconds.

    Both are busy half of the time; the primary sends 1000 bytes a second, the worker 500.
    """
    devices = [
        DeviceState(
            rank=rank,
            role=role,
            device="cpu",
            name="CPU",
            pages_used=10 + rank,
            pages_total=40,
            heads=8,
            busy_seconds=seconds / 2,
            wait_seconds=seconds / 4,
            attention_seconds=seconds / 8,
            predicted_us=100.0,
            measured_us=120.0,
            silent_seconds=0.1,
            lanes_in=3 * rank,
            lanes_out=1,
        )
        for rank, role in enumerate(("primary", "attention worker"))
    ]
    fields: dict[str, Any] = {
        "status": EngineStatus(step=7, num_running=2, num_waiting=1, num_preemptions=3, kv_usage=0.25),
        "clock": 100.0 + seconds,
        "devices": devices,
        "links": [
            LinkState(source=0, target=1, num_bytes=int(1000 * seconds)),
            LinkState(source=1, target=0, num_bytes=int(500 * seconds)),
        ],
        "links_clock": 99.0 + seconds,
        "num_stages": 1,
        "num_groups": 2,
        "sequences": [
            SequenceState(id="cmpl-1#7/0", num_tokens=12, is_prefilling=True, owners=((0, 1),)),
            SequenceState(id="cmpl-1#7/1", num_tokens=13, is_prefilling=False, owners=((1, 1),)),
        ],
        "events": [],
        "counters": FleetCounters(
            num_dispatches=5,
            num_rebalances=1,
            num_reliefs=2,
            num_migrations=4,
            migrated_bytes=4096,
            step_tokens=[3, *[0] * (len(STEP_TOKEN_BOUNDS) - 1), 1],
            num_step_tokens=20_003,
        ),
    }
    return FleetSnapshot(**(fields | changes))


def event(number: int, kind: str = "dispatch", sequence_id: str = "cmpl-1#7/0", clock: float = 100.0) -> FleetEvent:
    return FleetEvent(number=number, clock=clock, kind=kind, sequence_id=sequence_id, text=f"event {number}")


class WatchedEngine:
    """As much of `AsyncLLM` as watching needs."""

    def __init__(self, snapshot: FleetSnapshot | None = None) -> None:
        self.snapshot = snapshot or make_snapshot()
        self.queries: list[FleetSnapshotQuery] = []
        self.answers = asyncio.Event()  # while it is not set, the driver is silent
        self.answers.set()
        self.is_dead = False

    async def ask(self, question: FleetSnapshotQuery, kind: type[FleetSnapshot]) -> FleetSnapshot:
        assert kind is FleetSnapshot
        self.queries.append(question)
        await self.answers.wait()
        if self.is_dead:
            raise EngineDeadError("rank 1 was killed.")
        events = [event for event in self.snapshot.events if event.number > question.after_event]
        return msgspec.structs.replace(self.snapshot, events=events)


@dataclass
class FakeRequest:
    """As much of `Request` as is measured."""

    id: str = "cmpl-1"
    prompt_token_ids: list[int] = field(default_factory=lambda: [5] * 10)
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=8))
    queued_s: float | None = None
    prefill_s: float | None = None

    @property
    def num_completions(self) -> int:
        return self.params.n


@dataclass
class FakePiece:
    """As much of `Piece` as is measured."""

    index: int = 0
    token_ids: list[int] = field(default_factory=lambda: [7])
    finish_reason: str | None = None
    error: str | None = None
