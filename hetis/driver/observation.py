"""Answers to front ends that watch a running fleet, from what the driver knows: they wait for no rank."""

from collections.abc import Mapping
from math import inf

from hetis.core.device_info import RankStats
from hetis.core.messages import EngineStatus, FleetCounters, FleetSnapshot, FleetSnapshotQuery
from hetis.driver.front_ends import own_id
from hetis.driver.watch import Watch
from hetis.engine.engine import Engine

STATUS_SECONDS = 0.25  # between two outputs that carry the status
STATS_SECONDS = 1.0  # between two questions to the ranks, whose counters alone have the bytes of links


class Observation:
    """The state of one running fleet. `now`: seconds on the driver's clock."""

    def __init__(self, engine: Engine, watch: Watch) -> None:
        self._engine, self._watch = engine, watch
        self._next_status = -inf
        self._stats: Mapping[int, RankStats] = {}  # as of `_stats_clock`
        self._stats_clock: float | None = None  # None: the ranks have not answered
        self._asked = -inf

    def status(self) -> EngineStatus:
        status = self._engine.status()
        status.in_flight_seconds = self._watch.in_flight_seconds()
        status.silent = self._watch.describe_silent()
        return status

    def status_if_due(self, now: float) -> EngineStatus | None:
        """The status for outputs that are sent now; None if others have carried it a moment ago."""
        if now < self._next_status:
            return None
        self._next_status = now + STATUS_SECONDS
        return self.status()

    def snapshot(self, query: FleetSnapshotQuery, now: float) -> FleetSnapshot:
        snapshot = self._engine.snapshot(query, now, self._stats)
        snapshot.status = self.status()
        snapshot.links_clock = self._stats_clock
        silences = self._watch.silent_seconds()
        for device in snapshot.devices:
            device.silent_seconds = silences.get(device.rank, 0.0)
        for sequence in snapshot.sequences:
            sequence.id = own_id(sequence.id)
        for event in snapshot.events:
            event.sequence_id = own_id(event.sequence_id)
        return snapshot

    def ask_ranks(self, now: float) -> bool:
        """Whether to ask the ranks for their counters, for the next snapshot; notes that they are asked."""
        if now - self._asked < STATS_SECONDS:
            return False
        self._asked = now
        return True

    def on_stats(self, stats: Mapping[int, RankStats], now: float) -> None:
        """Takes the counters of all ranks."""
        self._stats, self._stats_clock = dict(stats), now


def starting_snapshot(watch: Watch, now: float) -> FleetSnapshot:
    """A fleet that is not up yet."""
    return FleetSnapshot(status=starting_status(watch), clock=now, counters=FleetCounters())


def starting_status(watch: Watch) -> EngineStatus:
    return EngineStatus(silent=watch.describe_silent())
