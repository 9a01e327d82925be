"""What front ends may see of a running fleet: counters that the engine keeps for it, and the `FleetSnapshot`.

A step pays for a few additions; all that costs more is computed when a front end asks.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

from hetis.cache.cache_manager import CacheManager
from hetis.cache.migration import Migrator
from hetis.core.device_info import RankStats
from hetis.core.messages import (
    STEP_TOKEN_BOUNDS,
    DeviceState,
    FleetCounters,
    LinkState,
    SequenceState,
    Setup,
    StepTimes,
    TokenOutput,
)
from hetis.core.placement import Move, Placement
from hetis.core.plan import Plan
from hetis.core.request import Sequence
from hetis.core.step_times import Activity
from hetis.engine.balancer import Balancer
from hetis.engine.events import EventLog
from hetis.engine.observer import Observer

_WAIT, _STAGE = int(Activity.WAIT), int(Activity.STAGE)
_APPEND, _ATTENTION, _PROMPT = int(Activity.APPEND), int(Activity.ATTENTION), int(Activity.PROMPT)


class Telemetry:
    """Counters and events of one engine."""

    def __init__(self, setup: Setup, cache: CacheManager) -> None:
        self._setup, self._cache = setup, cache
        self._times = {rank: RankTimes() for rank in setup.plan.ranks}
        self._step_tokens = [0] * (len(STEP_TOKEN_BOUNDS) + 1)
        self._num_step_tokens = 0
        self.num_dispatches = 0
        self._lanes_in: Counter[int] = Counter()  # by rank
        self._lanes_out: Counter[int] = Counter()
        self.events = EventLog()

    def on_preempted(self, preempted: Iterable[Sequence]) -> None:
        for sequence in preempted:
            self.events.on_preemption(sequence.id, len(sequence.token_ids))

    def on_step(self, num_tokens: int, admitted: Iterable[tuple[Sequence, Placement]]) -> None:
        """Notes a step that begins at `events.now`, with so many new tokens."""
        self._step_tokens[bisect_left(STEP_TOKEN_BOUNDS, num_tokens)] += 1
        self._num_step_tokens += num_tokens
        for sequence, placement in admitted:
            self.num_dispatches += 1
            self.events.on_dispatch(sequence.id, placement)
            if sequence.queued_at is not None and sequence.admitted_at is None:
                sequence.admitted_at = self.events.now

    def on_migrated(self, moves: list[Move]) -> None:
        """Notes lanes that have migrated."""
        self.events.on_moves("migration", moves)
        self._lanes_in.update(move.target for move in moves)
        self._lanes_out.update(move.source for move in moves)

    def on_times(self, times: StepTimes) -> None:
        self._times[times.rank].add(times)

    # --- parts of a snapshot ------------------------------------------------------------------------------------------

    def counters(self, balancer: Balancer | None, migrator: Migrator) -> FleetCounters:
        return FleetCounters(
            num_dispatches=self.num_dispatches,
            num_rebalances=balancer.num_rebalances if balancer else 0,
            num_reliefs=balancer.num_reliefs if balancer else 0,
            num_migrations=migrator.num_committed,
            migrated_bytes=migrator.bytes_sent,
            step_tokens=self._step_tokens,
            num_step_tokens=self._num_step_tokens,
        )

    def devices(self, observer: Observer | None) -> list[DeviceState]:
        """In rank order. `observer`: None where speeds are not followed."""
        plan, usage = self._setup.plan, self._cache.usage()
        states = []
        for member, info in zip(plan.members, self._setup.fleet, strict=True):
            rank, times = member.rank, self._times[member.rank]
            predicted_us, measured_us = observer.mean_us(rank) if observer else (0.0, 0.0)
            states.append(
                DeviceState(
                    rank=rank,
                    role=plan.role_of(rank),
                    device=member.device,
                    name=info.name,
                    pages_used=usage[rank].pages_used,
                    pages_total=usage[rank].pages_total,
                    heads=usage[rank].num_lanes * self._setup.spec.queries_per_group,
                    busy_seconds=1e-6 * times.busy_us,
                    wait_seconds=1e-6 * times.wait_us,
                    attention_seconds=1e-6 * times.attention_us,
                    predicted_us=predicted_us,
                    measured_us=measured_us,
                    lanes_in=self._lanes_in[rank],
                    lanes_out=self._lanes_out[rank],
                )
            )
        return states

    def sequences(self, running: Iterable[Sequence]) -> list[SequenceState]:
        return [
            SequenceState(
                id=sequence.id,
                num_tokens=len(sequence.token_ids),
                is_prefilling=sequence.is_prefilling,
                owners=self._cache.owners(sequence.slot),
            )
            for sequence in running
        ]


class RankTimes:
    """Microseconds of one rank. With several stages an attention worker's add up, although they run at the same time.

    `add` is called for every rank in every step, about 0.6 us each: numbers index twice as fast as members of an enum.
    """

    def __init__(self) -> None:
        self.busy_us = 0.0  # in steps, without waiting
        self.wait_us = 0.0  # in steps, for other ranks
        self.attention_us = 0.0  # of `busy_us`, what `RankStats` counts

    def add(self, times: StepTimes) -> None:
        for stage in times.stages:
            us = stage.activity_us
            wait_us = us[_WAIT] + us[_STAGE]
            self.wait_us += wait_us
            self.busy_us += sum(us) - wait_us
            self.attention_us += us[_APPEND] + us[_ATTENTION] + us[_PROMPT]


def link_states(plan: Plan, stats: Mapping[int, RankStats]) -> list[LinkState]:
    """Both directions of every link, from what its ends have sent; nothing of ranks whose counters are not known."""
    directions = [(source.rank, target.rank) for link in plan.links for source, target in (link, link[::-1])]
    return [
        LinkState(source=source, target=target, num_bytes=stats[source].bytes_sent.get(f"{source}->{target}", 0))
        for source, target in directions
        if source in stats
    ]


def report_waiting(output: TokenOutput, sequence: Sequence, now: float) -> None:
    """Notes in `output`, the first token of a sequence, how long it waited to be placed, and from there for the token.

    Later tokens, also those after a preemption, report nothing.
    """
    queued, admitted = sequence.queued_at, sequence.admitted_at
    assert queued is not None, "queued with its arrival"
    assert admitted is not None, "placed before it has a token"
    output.queued_s, output.prefill_s = admitted - queued, now - admitted
    sequence.queued_at = sequence.admitted_at = None
