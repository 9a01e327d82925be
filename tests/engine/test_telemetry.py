"""What the engine tells of itself: status, waiting times, events, devices and sequences, on a clock of the test."""

from itertools import chain

import msgspec
import pytest

from hetis.core.device_info import RankStats
from hetis.core.messages import (
    STEP_TOKEN_BOUNDS,
    AddRequest,
    FleetSnapshot,
    FleetSnapshotQuery,
    StepResult,
    StepTimes,
    TokenOutput,
)
from hetis.core.messages.step_command import decode
from hetis.core.placement import Dispatcher, Move, Placement
from hetis.core.sampling_params import SamplingParams
from hetis.core.step_times import Activity, StageTimes
from hetis.dispatcher.simple_dispatchers import EvenDispatcher, PrimaryOnlyDispatcher
from hetis.engine.engine import Engine
from hetis.engine.events import MAX_EVENTS, EventLog
from hetis.engine.policies import Policies
from tests.engine.measured_fleet import SPEC, Fleet, make_plan

PAGE = 16


class Served:
    """An engine whose ranks answer every step at once, with token 7."""

    def __init__(self, num_workers: int, num_pages: int, dispatcher: Dispatcher | None = None) -> None:
        """`num_pages`: of every rank."""
        plan = make_plan([1], num_workers)
        fleet = Fleet(plan, [("host", "cpu", f"device {rank}") for rank in plan.ranks])
        setup = msgspec.structs.replace(fleet.setup, num_pages=dict.fromkeys(plan.ranks, num_pages))
        self.engine = Engine(setup, Policies(dispatcher or EvenDispatcher()))
        self.now = 1000.0

    def add(self, name: str, prompt_len: int = 30, max_tokens: int = 8) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = AddRequest(id=name, token_ids=[5] * prompt_len, prompt_len=prompt_len, seed=0, params=params)
        self.engine.add(request, self.now)

    def step(self, seconds: float = 0.0) -> list[TokenOutput]:
        """A step that takes so long."""
        command = self.engine.step(self.now)
        assert command is not None
        self.now += seconds
        count = len(decode(command, 0).sampling_row_I)
        self.engine.on_result(StepResult(step=command.step, tokens=[7] * count), self.now)
        return self.engine.take_outputs()

    def show(
        self, max_sequences: int = 64, after_event: int = 0, stats: dict[int, RankStats] | None = None
    ) -> FleetSnapshot:
        query = FleetSnapshotQuery(max_sequences=max_sequences, after_event=after_event)
        return self.engine.snapshot(query, self.now, stats or {})


# --- status -----------------------------------------------------------------------------------------------------------


def test_the_status_counts_steps_sequences_and_pages() -> None:
    served = Served(num_workers=0, num_pages=4 * 6)  # for two sequences: 2 pages for each of 4 groups, and 1 to grow
    assert served.engine.status().kv_usage == 0.0
    for name in "abc":
        served.add(name)
    command = served.engine.step(served.now)
    assert command is not None
    status = served.engine.status()
    assert (status.step, status.num_running, status.num_waiting) == (0, 2, 1), "a step in flight is not finished"
    assert status.kv_usage == 16 / 24
    served.engine.on_result(StepResult(step=command.step, tokens=[7, 7]), served.now)
    assert served.engine.status().step == 1
    for name in "abc":
        served.engine.abort(name)
    status = served.engine.status()
    assert (status.num_running, status.num_waiting, status.kv_usage) == (0, 0, 0.0)


# --- waiting times ----------------------------------------------------------------------------------------------------


def test_the_first_token_says_how_long_it_was_waited_for() -> None:
    served = Served(num_workers=0, num_pages=64)
    served.add("a")
    served.now += 2.0
    [first] = served.step(seconds=0.5)
    assert (first.queued_s, first.prefill_s) == (2.0, 0.5)
    [second] = served.step(seconds=0.25)
    assert (second.queued_s, second.prefill_s) == (None, None)


def test_a_sequence_that_waits_for_pages_is_queued_for_so_long() -> None:
    served = Served(num_workers=0, num_pages=2 * 4)
    served.add("a", max_tokens=2)
    served.add("b", max_tokens=1)
    found = {output.id: output for _ in range(3) for output in served.step(seconds=1.0) if output.queued_s is not None}
    assert (found["a"].queued_s, found["a"].prefill_s) == (0.0, 1.0)
    assert (found["b"].queued_s, found["b"].prefill_s) == (2.0, 1.0)


def test_a_preempted_sequence_reports_once_and_from_its_first_placement() -> None:
    served = Served(num_workers=0, num_pages=64)
    served.add("a", prompt_len=100)  # more than the 64 tokens of a step
    assert served.step(seconds=1.0) == []
    [sequence] = served.engine.scheduler.running
    served.engine.scheduler.preempt(sequence)
    served.now += 1.0
    assert served.step(seconds=1.0) == []
    [first] = served.step(seconds=1.0)
    assert (first.queued_s, first.prefill_s) == (0.0, 4.0)
    served.engine.scheduler.preempt(sequence)
    outputs = served.step(seconds=1.0) + served.step(seconds=1.0)
    assert [(output.queued_s, output.prefill_s) for output in outputs] == [(None, None)]


def test_a_sequence_without_a_token_reports_no_waiting() -> None:
    served = Served(num_workers=0, num_pages=64)
    served.add("a")
    command = served.engine.step(served.now)
    assert command is not None
    served.engine.on_result(StepResult(step=command.step, tokens=[0], errors={0: "not finite"}), served.now)
    [output] = served.engine.take_outputs()
    assert (output.finish_reason, output.queued_s) == ("error", None)


# --- the snapshot -----------------------------------------------------------------------------------------------------


def test_a_snapshot_shows_where_heads_live() -> None:
    served = Served(num_workers=2, num_pages=64)
    for name in "abc":
        served.add(name, prompt_len=20)
    served.step()
    snapshot = served.show(max_sequences=2)
    assert [sequence.id for sequence in snapshot.sequences] == ["a", "b"], "the first ones"
    assert [sequence.owners for sequence in snapshot.sequences] == [
        served.engine.cache.owners(sequence.slot) for sequence in served.engine.scheduler.running[:2]
    ]
    assert (snapshot.num_stages, snapshot.num_groups) == (1, SPEC.num_head_groups)
    lanes = [rank for each in served.show().sequences for rank in chain.from_iterable(each.owners)]
    assert [device.heads for device in snapshot.devices] == [
        lanes.count(rank) * SPEC.queries_per_group for rank in (0, 1, 2)
    ]
    assert [device.role for device in snapshot.devices] == ["primary", "attention worker", "attention worker"]
    assert [device.name for device in snapshot.devices] == ["device 0", "device 1", "device 2"]
    used = sum(device.pages_used for device in snapshot.devices)
    assert used == 3 * SPEC.num_head_groups * 2, "2 pages of 16 tokens for every lane"
    assert snapshot.status.kv_usage == used / (3 * 64)


def test_sequences_are_in_prefill_until_their_prompt_is_computed() -> None:
    served = Served(num_workers=0, num_pages=64)
    served.add("a", prompt_len=100)
    states = []
    for _ in range(3):
        served.step()
        states += [(each.num_tokens, each.is_prefilling) for each in served.show().sequences]
    assert states == [(100, True), (101, False), (102, False)]


def test_seconds_of_ranks_add_up() -> None:
    served = Served(num_workers=1, num_pages=64)
    us = [float(10 ** int(activity)) for activity in Activity]
    stage = StageTimes(stage=0, heads=4, kv_tokens=10.0, activity_us=us)
    for _ in range(2):
        served.engine.on_times(StepTimes(rank=1, step=0, num_decodes=1, num_prompt_tokens=0, stages=[stage, stage]))
    idle, worker = served.show().devices
    wait = us[Activity.WAIT] + us[Activity.STAGE]
    assert worker.wait_seconds == pytest.approx(4e-6 * wait)
    assert worker.busy_seconds == pytest.approx(4e-6 * (sum(us) - wait))
    attention = us[Activity.APPEND] + us[Activity.ATTENTION] + us[Activity.PROMPT]
    assert worker.attention_seconds == pytest.approx(4e-6 * attention)
    assert (idle.busy_seconds, idle.wait_seconds, idle.attention_seconds) == (0.0, 0.0, 0.0)


def test_a_migrated_lane_counts_at_both_of_its_devices() -> None:
    served = Served(num_workers=2, num_pages=64)
    served.add("a")
    served.step()
    engine = served.engine
    [sequence] = engine.scheduler.running
    source = engine.cache.owners(sequence.slot)[0][0]
    target = 2 if source != 2 else 1
    assert engine.migrator.start([Move(slot=sequence.slot, stage=0, group=0, source=source, target=target)])
    while engine.migrator.is_busy:
        served.step()
    devices = {device.rank: (device.lanes_in, device.lanes_out) for device in served.show().devices}
    assert devices == {0: (0, 0), 1: (0, 0), 2: (0, 0)} | {target: (1, 0), source: (0, 1)}


def test_links_are_known_as_soon_as_their_senders_have_counted() -> None:
    served = Served(num_workers=2, num_pages=64)
    assert served.show().links == []
    stats = {
        0: RankStats(rank=0, bytes_sent={"0->1": 10, "0->2": 20}),
        1: RankStats(rank=1, bytes_sent={"1->0": 30}),
    }
    assert [(link.source, link.target, link.num_bytes) for link in served.show(stats=stats).links] == [
        (0, 1, 10),
        (1, 0, 30),
        (0, 2, 20),
    ]


def test_steps_are_counted_by_their_tokens() -> None:
    served = Served(num_workers=0, num_pages=64)
    served.add("a", prompt_len=30, max_tokens=3)
    for _ in range(3):
        served.step()
    counters = served.show().counters
    counts = dict(zip((*STEP_TOKEN_BOUNDS, None), counters.step_tokens, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {32: 1, 1: 2}
    assert counters.num_step_tokens == 32


# --- events -----------------------------------------------------------------------------------------------------------


def test_placements_and_preemptions_are_events() -> None:
    served = Served(num_workers=0, num_pages=4 * 4, dispatcher=PrimaryOnlyDispatcher())
    served.add("a", prompt_len=PAGE, max_tokens=40)
    served.add("b", prompt_len=PAGE, max_tokens=40)
    while not served.engine.scheduler.num_preemptions:
        served.step(seconds=1.0)
    events = served.show().events
    assert [(event.kind, event.sequence_id) for event in events] == [
        ("dispatch", "a"),
        ("dispatch", "b"),
        ("preemption", "b"),
    ]
    assert [event.number for event in events] == [1, 2, 3]
    assert events[0].clock == events[1].clock == 1000.0
    assert events[0].text == "head groups placed: 4 on rank 0"
    assert events[2].text.startswith("33 tokens to recompute")
    assert [event.number for event in served.show(after_event=2).events] == [3]


def test_moves_are_told_by_their_routes() -> None:
    log = EventLog()
    log.now = 5.0
    log.on_moves("rebalance", [])
    log.on_moves(
        "migration", [Move(slot=0, stage=0, group=group, source=0, target=1 + group // 2) for group in range(3)]
    )
    [event] = log.after(0)
    assert (event.kind, event.clock, event.sequence_id) == ("migration", 5.0, "")
    assert event.text == "3 head groups: 2 from rank 0 to 1, 1 from rank 0 to 2"


def test_the_log_is_bounded_and_its_numbers_have_no_gaps() -> None:
    log = EventLog()
    for number in range(1, 2 * MAX_EVENTS + 1):
        log.on_dispatch(f"s{number}", Placement(owners=((0,),)))
    numbers = [event.number for event in log.after(0)]
    assert numbers == list(range(MAX_EVENTS + 1, 2 * MAX_EVENTS + 1))
    assert log.after(numbers[-1]) == []
