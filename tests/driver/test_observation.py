"""What the driver answers to front ends that watch: ages, silent ranks, how often ranks are asked."""

import msgspec

from hetis.core.device_info import RankStats
from hetis.core.messages import AddRequest, FleetSnapshotQuery, Heartbeat
from hetis.core.sampling_params import SamplingParams
from hetis.dispatcher.simple_dispatchers import EvenDispatcher
from hetis.driver.observation import STATS_SECONDS, STATUS_SECONDS, Observation, starting_snapshot
from hetis.driver.watch import SILENT_SECONDS, Watch
from hetis.engine.engine import Engine
from hetis.engine.policies import Policies
from tests.engine.measured_fleet import Fleet, make_plan


class Observed:
    """An engine on one primary and one worker, and a watch, on one clock."""

    def __init__(self) -> None:
        plan = make_plan([1], 1)
        fleet = Fleet(plan, [("elsewhere", "cpu", "device")] * 2)
        self.now = 100.0
        self.engine = Engine(msgspec.structs.replace(fleet.setup, num_pages={0: 64, 1: 64}), Policies(EvenDispatcher()))
        self.watch = Watch(plan, 60.0, clock=lambda: self.now)
        for info in fleet.setup.fleet:
            self.watch.on_hello(info)
        self.observation = Observation(self.engine, self.watch)

    def beat(self, beat: Heartbeat) -> None:
        self.watch.on_heartbeat(beat.rank, beat.step)


def test_the_status_has_the_age_of_the_oldest_step() -> None:
    observed = Observed()
    assert observed.observation.status().in_flight_seconds == 0.0
    observed.watch.on_step(0)
    observed.now += 3.0
    observed.watch.on_step(1)
    observed.now += 1.0
    assert observed.observation.status().in_flight_seconds == 4.0
    observed.watch.on_result(0)
    assert observed.observation.status().in_flight_seconds == 0.0, "ranks begin step 1"
    observed.now += 2.0
    assert observed.observation.status().in_flight_seconds == 2.0
    observed.watch.on_result(1)
    assert observed.observation.status().in_flight_seconds == 0.0


def test_silent_ranks_are_named_with_their_last_step() -> None:
    observed = Observed()
    observed.beat(Heartbeat(rank=1, step=17))
    observed.now += SILENT_SECONDS + 1.0
    observed.beat(Heartbeat(rank=0, step=18))
    assert observed.observation.status().silent == [
        "rank 1 (attention worker on cpu) has sent no heartbeat for 3.0 s; last step 17"
    ]
    snapshot = observed.observation.snapshot(FleetSnapshotQuery(), observed.now)
    assert [device.silent_seconds for device in snapshot.devices] == [0.0, SILENT_SECONDS + 1.0]
    assert snapshot.status.silent == observed.observation.status().silent
    assert starting_snapshot(observed.watch, observed.now).status.silent == snapshot.status.silent


def test_outputs_carry_the_status_now_and_then() -> None:
    observation = Observed().observation
    times = [100.0 + STATUS_SECONDS * quarter / 4 for quarter in range(9)]
    assert [observation.status_if_due(now) is not None for now in times] == [True, *[False] * 3] * 2 + [True]


def test_ranks_are_asked_at_most_once_a_second() -> None:
    observation = Observed().observation
    assert observation.ask_ranks(0.0)
    assert not observation.ask_ranks(STATS_SECONDS / 2)
    assert observation.ask_ranks(STATS_SECONDS)


def test_a_snapshot_has_the_counters_of_the_last_answer_and_the_ids_of_front_ends() -> None:
    observed = Observed()
    request = AddRequest(id="3:a:b/0", token_ids=[5] * 10, prompt_len=10, seed=0, params=SamplingParams())
    observed.engine.add(request, observed.now)
    assert observed.engine.step(observed.now) is not None
    query = FleetSnapshotQuery(max_sequences=64)
    before = observed.observation.snapshot(query, observed.now)
    assert (before.links, before.links_clock) == ([], None)
    stats = {rank: RankStats(rank=rank, bytes_sent={f"{rank}->{1 - rank}": 10 + rank}) for rank in (0, 1)}
    observed.observation.on_stats(stats, 101.0)
    after = observed.observation.snapshot(query, 102.0)
    assert [(link.source, link.target, link.num_bytes) for link in after.links] == [(0, 1, 10), (1, 0, 11)]
    assert (after.links_clock, after.clock) == (101.0, 102.0)
    assert [sequence.id for sequence in after.sequences] == ["a:b/0"]
    assert [event.sequence_id for event in after.events] == ["a:b/0"]
