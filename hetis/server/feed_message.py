"""The message of the feed, and how one is made of two snapshots of the fleet."""

import time
from collections.abc import Iterable, Mapping
from statistics import quantiles
from typing import NamedTuple

import msgspec

from hetis.core.messages import DeviceState, FleetSnapshot, LinkState
from hetis.server.metrics import Metrics
from hetis.server.sampler import FleetSampler, SeenEvent, shown_id

RECENT_SECONDS = 60.0  # over which latencies are taken


class Requests(msgspec.Struct):
    running: int = 0  # sequences
    waiting: int = 0
    finished: int = 0  # requests
    failed: int = 0
    preemptions: int = 0  # of sequences


class Throughput(msgspec.Struct):
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0


class Latency(msgspec.Struct):
    """Of the last `RECENT_SECONDS`; null without a request."""

    ttft_p50_ms: float | None = None
    ttft_p95_ms: float | None = None
    tpot_p50_ms: float | None = None
    tpot_p95_ms: float | None = None


class Device(msgspec.Struct):
    rank: int
    role: str
    device: str
    name: str
    pages_used: int
    pages_total: int
    heads: int
    busy: float  # 0..1, since the message before
    predicted_us: float
    measured_us: float
    silent_s: float


class Link(msgspec.Struct):
    source: int
    target: int
    bytes_per_s: float


class RunningSequence(msgspec.Struct):
    id: str
    tokens: int
    state: str  # "prefill" or "decode"
    owners: tuple[tuple[int, ...], ...]  # [stage][group] rank


class Event(msgspec.Struct):
    time: float  # Unix time, seconds
    kind: str
    text: str


class FeedMessage(msgspec.Struct, kw_only=True):
    time: float  # Unix time, seconds
    uptime_s: float  # of the server
    model: str
    step: int
    state: str  # "starting", "ready", "draining" or "dead"
    requests: Requests
    throughput: Throughput
    latency: Latency
    devices: list[Device]
    links: list[Link]
    stages: int
    groups: int
    sequences: list[RunningSequence]
    events: list[Event]


class Seen(NamedTuple):
    """What the next message is compared with."""

    clock: float  # of this process, seconds
    prompt_tokens: int
    output_tokens: int
    snapshot: FleetSnapshot | None


class MessageMaker:
    """Makes messages. Rates are since the message before, those of devices and links by the driver's clock."""

    def __init__(self, sampler: FleetSampler, metrics: Metrics, model: str) -> None:
        self._sampler, self._metrics, self._model = sampler, metrics, model
        self._begin = time.monotonic()
        self._before = self._see()
        self._link_rates: list[Link] = []  # kept until the ranks have been asked again

    def restart(self) -> None:
        """Has rates begin now: no message has been made for a while."""
        self._before, self._link_rates = self._see(), []

    def make(self, state: str, events: Iterable[SeenEvent]) -> FeedMessage:
        before, now = self._before, self._see()
        self._before = now
        snapshot = now.snapshot
        seconds = max(1e-3, now.clock - before.clock)
        message = FeedMessage(
            time=time.time(),
            uptime_s=now.clock - self._begin,
            model=self._model,
            step=0,
            state=state,
            requests=Requests(finished=self._metrics.num_finished, failed=self._metrics.num_failed),
            throughput=Throughput(
                (now.prompt_tokens - before.prompt_tokens) / seconds,
                (now.output_tokens - before.output_tokens) / seconds,
            ),
            latency=self._latency(now.clock),
            devices=[],
            links=[],
            stages=0,
            groups=0,
            sequences=[],
            events=shown(events),
        )
        if snapshot is not None:
            self._fill(message, snapshot, before.snapshot)
        return message

    def _see(self) -> Seen:
        metrics = self._metrics
        return Seen(time.monotonic(), metrics.prompt_tokens, metrics.output_tokens, self._sampler.latest)

    def _fill(self, message: FeedMessage, snapshot: FleetSnapshot, before: FleetSnapshot | None) -> None:
        status, requests = snapshot.status, message.requests
        message.step = status.step
        requests.running, requests.waiting = status.num_running, status.num_waiting
        requests.preemptions = status.num_preemptions
        message.stages, message.groups = snapshot.num_stages, snapshot.num_groups
        message.devices = devices(snapshot, before, self._sampler.age)
        if before is None or snapshot.links_clock != before.links_clock:
            self._link_rates = links(snapshot, before)
        message.links = self._link_rates
        message.sequences = [
            RunningSequence(
                shown_id(each.id), each.num_tokens, "prefill" if each.is_prefilling else "decode", each.owners
            )
            for each in snapshot.sequences
        ]

    def _latency(self, now: float) -> Latency:
        first = [seconds for when, seconds in self._metrics.recent_ttft if now - when < RECENT_SECONDS]
        per_token = [seconds for when, seconds in self._metrics.recent_tpot if now - when < RECENT_SECONDS]
        return Latency(*percentiles_ms(first), *percentiles_ms(per_token))


def shown(events: Iterable[SeenEvent]) -> list[Event]:
    return [Event(event.time, event.kind, event.text) for event in events]


def percentiles_ms(seconds: list[float]) -> tuple[float | None, float | None]:
    """50th and 95th percentile, in milliseconds."""
    if not seconds:
        return None, None
    if len(seconds) == 1:
        return 1e3 * seconds[0], 1e3 * seconds[0]
    cuts = quantiles(seconds, n=20, method="inclusive")
    return 1e3 * cuts[9], 1e3 * cuts[18]


def devices(snapshot: FleetSnapshot, before: FleetSnapshot | None, age: float) -> list[Device]:
    """`age`: seconds since the snapshot came, in which no rank can have been heard of."""
    earlier = {device.rank: device for device in before.devices} if before is not None else {}
    seconds = snapshot.clock - before.clock if before is not None else 0.0
    return [
        Device(
            rank=each.rank,
            role=each.role,
            device=each.device,
            name=each.name,
            pages_used=each.pages_used,
            pages_total=each.pages_total,
            heads=each.heads,
            busy=_busy(each, earlier, seconds),
            predicted_us=each.predicted_us,
            measured_us=each.measured_us,
            silent_s=each.silent_seconds + age,
        )
        for each in snapshot.devices
    ]


def _busy(device: DeviceState, earlier: Mapping[int, DeviceState], seconds: float) -> float:
    """The stages of an attention worker run at the same time, so their sum may be more than 1."""
    if device.rank not in earlier or seconds <= 0:
        return 0.0
    return min(1.0, (device.busy_seconds - earlier[device.rank].busy_seconds) / seconds)


def links(snapshot: FleetSnapshot, before: FleetSnapshot | None) -> list[Link]:
    """Rates between the last two times that ranks were asked; 0 until there are two."""
    earlier: dict[tuple[int, int], LinkState] = {}
    seconds = 0.0
    if before is not None and before.links_clock is not None and snapshot.links_clock is not None:
        earlier = {(link.source, link.target): link for link in before.links}
        seconds = snapshot.links_clock - before.links_clock
    return [Link(link.source, link.target, _rate(link, earlier, seconds)) for link in snapshot.links]


def _rate(link: LinkState, earlier: Mapping[tuple[int, int], LinkState], seconds: float) -> float:
    found = earlier.get((link.source, link.target))
    return 0.0 if found is None or seconds <= 0 else (link.num_bytes - found.num_bytes) / seconds
