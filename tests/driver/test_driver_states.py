"""The driver from the first hello to the end, with sockets of the test: which messages go where, and when.

Whenever the driver waits, the script of the test goes on by one step, so nothing depends on time.
"""

import io
import os
import re
import subprocess
from collections import defaultdict, deque
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hetis.comm.control import OWNER
from hetis.core import messages as m
from hetis.core.config import DriverArgs, EngineConfig
from hetis.core.device_info import DeviceInfo, RankStats
from hetis.core.measurements import AttentionSample, DenseSample, PrefillSample, TransferSample
from hetis.core.messages.step_command import decode
from hetis.core.plan_sources import resolve_plan
from hetis.core.sampling_params import SamplingParams
from hetis.driver import final_status, members
from hetis.driver.driver import run_job
from hetis.driver.members import Members
from hetis.driver.watch import GRACE_SECONDS, Watch
from hetis.engine.engine import Engine
from hetis.processes import start, supervision
from hetis.processes.failure import FailureReason, FailureRecord
from tests.dispatcher.fleets import make_spec
from tests.processes.look import DEADLINE

SPEC = msgspec.structs.replace(make_spec(4, num_layers=4), intermediate_size=128, vocab_size=512, max_position=256)
PARENT = 1000  # a descriptor that only the fake poller knows
TO_RANK = m.Setup | m.Measure | m.MeasureLink | m.StepCommand | m.StatsQuery | m.Shutdown | m.Abort | m.Pong
Script = Generator[list[tuple[object, int]] | None, None, None]
FRONT, OTHER_FRONT, THIRD_FRONT = b"front", b"other", b"third"
ATTACH = m.Attach(pid=os.getpid())


class Sockets:
    """A stand-in for ControlServer and its poller: keeps what the driver sends, gives it what the script has put."""

    def __init__(self, directory: Path) -> None:
        """`directory`: of the run."""
        self.poller, self.directory = self, directory
        self.script: Script  # set by `run`
        self.script_error: AssertionError | None = None  # which the driver takes for a failure of its own
        self.now = 0.0
        self.is_hidden = False
        self.registered: list[object] = []
        self.sent: list[tuple[str, bytes, Any]] = []
        self._inbox: dict[str, deque[tuple[bytes, m.Message]]] = defaultdict(deque)
        self._decoder = msgspec.msgpack.Decoder(TO_RANK)

    # --- the driver's side

    def register(self, what: object, flags: int = 0) -> None:
        self.registered.append(what)

    def unregister(self, what: object) -> None: ...

    def poll(self, milliseconds: int) -> list[tuple[object, int]]:
        try:
            return next(self.script) or []
        except StopIteration:
            self.script_error = AssertionError("the driver waits for what the script does not do")
        except AssertionError as error:
            self.script_error = error
        raise self.script_error

    def receive(self, client: str) -> tuple[bytes, m.Message] | None:
        return self._inbox[client].popleft() if self._inbox[client] else None

    def send(self, client: str, identity: bytes, message: m.Message | bytes) -> None:
        self.sent.append((client, identity, self._decoder.decode(message) if isinstance(message, bytes) else message))

    def hide(self) -> None:
        self.is_hidden = True

    # --- the script's side

    def put(self, client: str, identity: bytes, *messages: m.Message) -> None:
        self._inbox[client].extend((identity, message) for message in messages)

    def take(self, client: str, identity: bytes) -> list[Any]:
        """Messages to one client since the last time."""
        taken = [message for where, whom, message in self.sent if (where, whom) == (client, identity)]
        self.sent = [each for each in self.sent if each[:2] != (client, identity)]
        return taken

    def shut_down(self) -> None:
        """The owner ends the fleet."""
        self.put("front", OWNER.encode(), m.Shutdown())

    # --- what ranks do

    def hello(self, rank: int, free_memory: int = 1 << 30) -> None:
        info = DeviceInfo(
            rank=rank, device="cpu", name="", host="elsewhere", address="", pid=1000 + rank, num_threads=1,
            total_memory=1 << 30, free_memory=free_memory,
        )  # fmt: skip
        self.put("ranks", str(rank).encode(), m.Hello(info=info))

    def ready(self, rank: int) -> None:
        self.put("ranks", str(rank).encode(), m.Ready(rank=rank))

    def come_up(self) -> Script:
        """Both ranks join and load; for a fleet that is not measured."""
        self.hello(0)
        self.hello(1)
        yield None
        self.ready(0)
        self.ready(1)
        yield None
        self.take("ranks", b"0")
        self.take("ranks", b"1")

    def answer_step(self) -> m.StepCommand:
        """Takes and answers the one command that both ranks must have been given."""
        (command,), (same,) = self.take("ranks", b"0"), self.take("ranks", b"1")
        assert command == same
        self.answer(command)
        return command

    def answer(self, command: m.StepCommand) -> None:
        """Every row that samples draws token 7."""
        tokens = [7] * len(decode(command, 0).sampling_row_I)
        self.put("ranks", b"0", m.StepResult(step=command.step, tokens=tokens))


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sockets:
    found = Sockets(tmp_path)
    monkeypatch.setattr(members, "Watch", lambda plan, timeout: Watch(plan, timeout, clock=lambda: found.now))
    monkeypatch.setattr(members, "END_SECONDS", 0.0)
    monkeypatch.setattr(members, "FAIL_SECONDS", 0.0)
    return found


class Parent(io.RawIOBase):
    """What rank 0 writes to the driver, whose poller sees it as `PARENT`."""

    def __init__(self, line: bytes) -> None:
        self._line = line

    def fileno(self) -> int:
        return PARENT

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._line


def make_args(directory: Path, *, measure: bool = False, **options: Any) -> DriverArgs:
    """For a fleet of 1+1."""
    config = EngineConfig(
        plan="1+1", device="cpu", kv_cache_memory=1 << 20, max_model_len=64, profile_cache=False,
        **({"dispatch": "even"} | options),
    )  # fmt: skip
    plan = resolve_plan(config.plan, SPEC, config.device, config.kv_cache_memory)
    return DriverArgs(
        config=config, measure=measure, spec=SPEC, plan=plan, eos_token_ids=[3], run_directory=str(directory),
        address=None, announce=False, parent=1,
    )  # fmt: skip


def run(sockets: Sockets, script: Script, line: bytes = b"", **options: Any) -> None:
    """Runs a job that ends in order, with the script, which must have ended, too. `line`: what rank 0 writes."""
    assert exit_code(sockets, script, line, **options) == 0
    assert FailureRecord(sockets.directory).read() is None


def run_failing(sockets: Sockets, script: Script, line: bytes = b"", **options: Any) -> FailureReason:
    """Runs a job that fails; the recorded reason."""
    assert exit_code(sockets, script, line, **options) == 1
    reason = FailureRecord(sockets.directory).read()
    assert reason is not None
    return reason


def exit_code(sockets: Sockets, script: Script, line: bytes, **options: Any) -> int:
    args, sockets.script = make_args(sockets.directory, **options), script
    code = run_job(args, Members(args, sockets, Parent(line)))  # type: ignore[arg-type]
    if sockets.script_error is not None:
        raise sockets.script_error
    assert next(script, "the end") == "the end", "the driver ended before the script"
    return code


def request(name: str, **params: Any) -> m.AddRequest:
    full = SamplingParams(**({"max_tokens": 2} | params))
    return m.AddRequest(id=name, token_ids=[1, 2, 5], prompt_len=3, seed=0, params=full)


# --- joining ----------------------------------------------------------------------------------------------------------


def test_the_setup_goes_to_all_when_the_last_has_joined(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.hello(1)
        yield None
        assert sockets.sent == []
        sockets.hello(0)
        yield None
        (setup,), (same,) = sockets.take("ranks", b"0"), sockets.take("ranks", b"1")
        assert setup == same
        assert [info.rank for info in setup.fleet] == [0, 1]
        assert setup.eos_token_ids == [3]
        sockets.shut_down()
        yield None

    run(sockets, script())
    assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [m.Shutdown()]


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.hello(0, free_memory=1 << 10)
        sockets.hello(1)
        yield None

    reason = run_failing(sockets, script())
    assert re.search(r"ranks 0, 1 on cpu: .* do not fit", reason.text)
    assert reason.refused
    assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [], "no rank has begun to load"


def test_a_value_error_of_a_fleet_that_is_up_is_no_mistake_of_the_user(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_error(engine: Engine, now: float) -> None:
        raise ValueError("planted")

    def script() -> Script:
        yield from sockets.come_up()
        monkeypatch.setattr(Engine, "step", raise_error)
        yield None

    assert run_failing(sockets, script()) == FailureReason("the driver failed: ValueError: planted")
    assert "Traceback" in capsys.readouterr().err


def test_front_ends_get_ready_when_the_fleet_is_up_and_not_before(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, ATTACH)
        yield from sockets.come_up()
        (ready,) = sockets.take("front", FRONT)
        assert (ready.max_model_len, ready.vocab_size, ready.eos_token_ids) == (64, 512, [3])
        assert sockets.is_hidden, "no other process can connect"
        sockets.put("front", OTHER_FRONT, ATTACH)
        yield None
        assert sockets.take("front", OTHER_FRONT) == [ready]
        sockets.shut_down()
        yield None

    run(sockets, script())


def test_requests_before_the_fleet_is_up_are_refused_and_questions_wait(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, ATTACH, request("early"), m.AbortRequest(id="early"))
        sockets.put("front", FRONT, m.FleetQuery(), m.FleetQuery())
        sockets.put("front", OTHER_FRONT, m.ProfileQuery())
        yield None
        answers = sockets.take("front", FRONT)
        assert [answer.outputs[0].finish_reason for answer in answers] == ["error", "error"]
        assert "not up yet" in answers[0].outputs[0].error
        sockets.hello(0)
        sockets.hello(1)
        yield None
        for rank in (0, 1):
            sockets.ready(rank)
        yield None
        for rank in (b"0", b"1"):
            assert [type(message) for message in sockets.take("ranks", rank)] == [m.Setup, m.StatsQuery]
            sockets.put("ranks", rank, m.Stats(stats=RankStats(rank=int(rank))))
        yield None
        assert [type(message) for message in sockets.take("front", FRONT)] == [m.EngineReady, m.FleetStats]
        assert [type(message) for message in sockets.take("front", OTHER_FRONT)] == [m.ProfileReport]
        sockets.shut_down()
        yield None

    run(sockets, script())


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(rank: int, message: m.Measure | m.MeasureLink) -> m.Measured:
    sizes = [2**k for k in range(4, 16)]
    if isinstance(message, m.MeasureLink):
        ways = [TransferSample(n, 10 + 1e-3 * n) for n in sizes] if rank == message.primary else []
        return m.Measured(rank=rank, seconds=0.1, request=ways, reply=ways)
    if message.part == "attention":
        points = [(h, n) for h in (2, 8, 32) for n in (1000, 50_000, 1_000_000)]
        times = [AttentionSample(h, n, 5 + 0.1 * h + 1e-4 * n) for h, n in points]
        return m.Measured(rank=rank, seconds=0.1, read_bytes_per_us=100.0, attention=times)
    dense = [DenseSample(n, max(10.0, 0.5 * n)) for n in sizes]
    return m.Measured(rank=rank, seconds=0.1, dense=dense, prefill=[PrefillSample(n, 1.0 * n) for n in sizes])


def start_measuring(sockets: Sockets) -> Script:
    """Up to the first messages about it, which are not taken."""
    sockets.put("front", FRONT, ATTACH)
    sockets.hello(0)
    sockets.hello(1)
    yield None
    for rank in (b"0", b"1"):
        assert [type(message) for message in sockets.take("ranks", rank)] == [m.Setup]
        sockets.ready(int(rank))
    yield None


def test_a_fleet_is_up_when_all_is_measured(sockets: Sockets) -> None:
    def script() -> Script:
        yield from start_measuring(sockets)
        sockets.put("front", OTHER_FRONT, m.ProfileQuery())  # to be answered when there is a profile
        num_measured = 0
        while asked := [(rank, each) for rank in (0, 1) for each in sockets.take("ranks", str(rank).encode())]:
            assert all(isinstance(message, m.Measuring) for message in sockets.take("front", FRONT))
            assert sockets.take("front", OTHER_FRONT) == []
            for rank, message in asked:
                num_measured += 1
                sockets.put("ranks", str(rank).encode(), measured(rank, message))
            yield None
        assert num_measured >= 4, "attention, dense, and a link at both ends"
        assert [type(message) for message in sockets.take("front", FRONT)][-1] is m.EngineReady
        sockets.put("front", FRONT, m.ProfileQuery())
        yield None
        (report,) = sockets.take("front", FRONT)
        assert sockets.take("front", OTHER_FRONT) == [report]
        assert sorted(report.profile.devices) == [0, 1]
        assert [(link.primary, link.worker) for link in report.profile.links] == [(0, 1)]
        sockets.shut_down()
        yield None

    run(sockets, script(), dispatch="hetis")


def test_measuring_can_be_asked_for_where_placement_does_not_depend_on_it(sockets: Sockets) -> None:
    def script() -> Script:
        yield from start_measuring(sockets)
        assert [type(message) for message in sockets.take("ranks", b"0")] == [m.Measure]
        sockets.shut_down()
        yield None

    run(sockets, script(), dispatch="even", measure=True)


def test_a_fleet_that_is_shut_down_while_it_measures_ends_its_ranks(sockets: Sockets) -> None:
    """Ranks read messages when they have measured; `Abort` comes on another socket."""

    def script() -> Script:
        yield from start_measuring(sockets)
        assert [type(message) for message in sockets.take("ranks", b"0")] == [m.Measure]
        sockets.shut_down()
        yield None

    run(sockets, script(), dispatch="hetis")
    assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [m.Shutdown()]
    assert [type(message) for message in sockets.take("health", b"1")] == [m.Abort]


# --- serving ----------------------------------------------------------------------------------------------------------


def take_tokens(sockets: Sockets, front: bytes) -> dict[str, tuple[list[int], str | None]]:
    """By sequence: the tokens that a front end has got, and why the sequence ended."""
    found: dict[str, tuple[list[int], str | None]] = {}
    for outputs in sockets.take("front", front):
        assert isinstance(outputs, m.Outputs)
        for output in outputs.outputs:
            tokens, _ = found.get(output.id, ([], None))
            found[output.id] = [*tokens, *output.token_ids], output.finish_reason
    return found


def attach(sockets: Sockets, *fronts: bytes) -> Script:
    """A fleet comes up with these front ends."""
    for front in fronts:
        sockets.put("front", front, ATTACH)
    yield from sockets.come_up()
    for front in fronts:
        assert [type(message) for message in sockets.take("front", front)] == [m.EngineReady]


def test_steps_go_to_all_ranks_and_tokens_to_the_front_end_that_asked(sockets: Sockets) -> None:
    """Two front ends use one id."""

    def script() -> Script:
        yield from attach(sockets, FRONT, OTHER_FRONT, THIRD_FRONT)
        sockets.put("front", FRONT, request("a", max_tokens=3), request("b", max_tokens=1))
        sockets.put("front", OTHER_FRONT, request("a", max_tokens=2))
        yield None
        for _ in range(3):
            sockets.answer_step()
            yield None
        assert take_tokens(sockets, FRONT) == {"a": ([7, 7, 7], "length"), "b": ([7], "length")}
        assert take_tokens(sockets, OTHER_FRONT) == {"a": ([7, 7], "length")}
        assert take_tokens(sockets, THIRD_FRONT) == {}
        sockets.shut_down()
        yield None

    run(sockets, script())


def test_a_front_end_aborts_only_its_own_sequences(sockets: Sockets) -> None:
    def script() -> Script:
        yield from attach(sockets, FRONT, OTHER_FRONT)
        sockets.put("front", FRONT, request("a", max_tokens=2))
        sockets.put("front", OTHER_FRONT, request("b"))
        yield None
        sockets.answer_step()
        sockets.put("front", OTHER_FRONT, m.AbortRequest(id="a"), m.AbortRequest(id="b"))
        yield None
        sockets.answer_step()
        yield None
        assert take_tokens(sockets, FRONT) == {"a": ([7, 7], "length")}
        assert take_tokens(sockets, OTHER_FRONT)["b"][1] == "abort"
        sockets.shut_down()
        yield None

    run(sockets, script())


@pytest.mark.parametrize("how", ["detaches", "dies"])
def test_a_front_end_that_goes_away_costs_only_its_own_sequences(sockets: Sockets, how: str) -> None:
    child = subprocess.Popen(["sleep", "1000"])

    def script() -> Script:
        sockets.put("front", OTHER_FRONT, m.Attach(pid=child.pid))
        yield from attach(sockets, FRONT)
        assert [type(message) for message in sockets.take("front", OTHER_FRONT)] == [m.EngineReady]
        sockets.put("front", FRONT, request("a", max_tokens=3))
        sockets.put("front", OTHER_FRONT, request("a", max_tokens=50), request("b", max_tokens=50))
        yield None
        assert len(decode(sockets.answer_step(), 0).sampling_row_I) == 3
        if how == "detaches":
            sockets.put("front", OTHER_FRONT, m.Detach(), request("late"))
            yield None
        else:
            child.kill()
            child.wait()
            yield [(sockets.registered[1], 1)]  # the first one is `PARENT`
        sockets.put("front", OTHER_FRONT, request("later"))
        for _ in range(2):
            assert len(decode(sockets.answer_step(), 0).sampling_row_I) == 1, "of the other front end"
            yield None
        assert take_tokens(sockets, FRONT) == {"a": ([7, 7, 7], "length")}
        errors = {name: reason for name, (_, reason) in take_tokens(sockets, OTHER_FRONT).items() if reason}
        assert errors == dict.fromkeys(["late", "later"] if how == "detaches" else ["later"], "error"), "not attached"
        sockets.put("front", FRONT, m.FleetQuery())
        yield None
        for rank in (b"0", b"1"):
            sockets.put("ranks", rank, m.Stats(stats=RankStats(rank=int(rank))))
        yield None
        [stats] = sockets.take("front", FRONT)
        assert [member.pages_used for member in stats.members] == [0, 0]
        sockets.shut_down()
        yield None

    try:
        run(sockets, script())
    finally:
        child.kill()
        child.wait()


def test_what_cannot_be_obeyed_is_answered(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.Attach(pid=1 << 30), request("early"))
        yield from attach(sockets, OTHER_FRONT)
        sockets.put("front", FRONT, request("a"), m.AbortRequest(id="a"), m.Shutdown(), m.Detach())
        yield None
        refused, early, first, ended, owner = sockets.take("front", FRONT)
        assert "no process" in refused.reason
        assert "not up yet" in early.outputs[0].error
        assert "not attached" in first.outputs[0].error
        assert ended.outputs[0].finish_reason == "abort"
        assert "only the owner" in owner.reason
        sockets.put("front", OTHER_FRONT, request("a"), request("a"), ATTACH)
        yield None
        twice, ready = sockets.take("front", OTHER_FRONT)
        assert "in use" in twice.reason
        assert isinstance(ready, m.EngineReady)
        for _ in range(2):
            sockets.answer_step()
            yield None
        assert take_tokens(sockets, OTHER_FRONT) == {"a": ([7, 7], "length")}, "the second one changes nothing"
        sockets.shut_down()
        yield None

    run(sockets, script())


def test_a_request_that_can_never_run_is_refused_and_the_others_go_on(sockets: Sockets) -> None:
    def script() -> Script:
        yield from attach(sockets, FRONT)
        endless = msgspec.structs.replace(request("endless"), token_ids=[1] * 100_000)
        sockets.put("front", FRONT, endless, request("good", max_tokens=1))
        yield None
        (refused,) = sockets.take("front", FRONT)[0].outputs
        assert (refused.id, refused.finish_reason) == ("endless", "error")
        sockets.answer_step()
        yield None
        assert [one.finish_reason for each in sockets.take("front", FRONT) for one in each.outputs] == ["length"]
        sockets.shut_down()
        yield None

    run(sockets, script())


def test_a_request_that_is_aborted_gets_no_more_steps(sockets: Sockets) -> None:
    def script() -> Script:
        yield from attach(sockets, FRONT)
        sockets.put("front", FRONT, request("a", max_tokens=50))
        yield None
        command = sockets.answer_step()
        assert command.admitted
        yield None
        sockets.answer_step()
        sockets.put("front", FRONT, m.AbortRequest(id="a"), m.AbortRequest(id="never was"))
        yield None
        sockets.take("ranks", b"0")
        yield None
        assert [message for message in sockets.take("ranks", b"0") if message.sampling_rows] == []
        sockets.shut_down()
        yield None

    run(sockets, script())


def test_one_question_to_the_ranks_answers_all_front_ends(sockets: Sockets) -> None:
    def script() -> Script:
        yield from sockets.come_up()
        sockets.put("front", FRONT, m.FleetQuery())
        sockets.put("front", OTHER_FRONT, m.FleetQuery())
        yield None
        assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [m.StatsQuery()]
        sockets.put("ranks", b"1", m.Stats(stats=RankStats(rank=1, attention_seconds=2.0)))
        yield None
        assert sockets.sent == [], "rank 0 has not answered"
        sockets.put("ranks", b"0", m.Stats(stats=RankStats(rank=0, attention_seconds=6.0)))
        yield None
        (one,), (other,) = sockets.take("front", FRONT), sockets.take("front", OTHER_FRONT)
        assert one == other
        assert [member.attention_share for member in one.members] == [0.75, 0.25]
        sockets.shut_down()
        yield None

    run(sockets, script())


def test_the_state_of_a_fleet_is_told_at_once_also_during_start_up(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.StatusQuery(), m.FleetSnapshotQuery())
        yield None
        status, snapshot = sockets.take("front", FRONT)
        assert status == m.EngineStatus()
        assert (snapshot.status, snapshot.devices, snapshot.sequences) == (m.EngineStatus(), [], [])
        yield from attach(sockets, FRONT)
        sockets.put("front", FRONT, request("a", max_tokens=3), request("b", max_tokens=3))
        yield None
        sockets.answer_step()
        yield None
        sockets.put("front", FRONT, m.StatusQuery(), m.FleetSnapshotQuery(max_sequences=1))
        sockets.now += 3.0  # without heartbeats, and with a step in flight
        yield None
        outputs, status, snapshot = sockets.take("front", FRONT)
        assert outputs.status.step == 1
        assert (status.step, status.num_running, status.num_waiting) == (1, 2, 0)
        assert status.in_flight_seconds == 3.0
        assert [sentence.partition(" (")[0] for sentence in status.silent] == ["rank 0", "rank 1"]
        assert [(each.id, each.num_tokens) for each in snapshot.sequences] == [("a", 4)]
        assert [event.sequence_id for event in snapshot.events] == ["a", "b"]
        assert [device.silent_seconds for device in snapshot.devices] == [3.0, 3.0]
        sockets.shut_down()
        yield None

    run(sockets, script())


def test_ranks_are_asked_for_their_counters_while_a_front_end_watches(sockets: Sockets) -> None:
    """The first snapshot does not wait for them."""

    def script() -> Script:
        yield from sockets.come_up()
        sockets.put("front", FRONT, m.FleetSnapshotQuery())
        sockets.put("front", OTHER_FRONT, m.FleetSnapshotQuery())
        yield None
        (first,), (other,) = sockets.take("front", FRONT), sockets.take("front", OTHER_FRONT)
        assert first.links == other.links == []
        assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [m.StatsQuery()], "asked once"
        for rank in (0, 1):
            stats = RankStats(rank=rank, bytes_sent={f"{rank}->{1 - rank}": 10 + rank})
            sockets.put("ranks", str(rank).encode(), m.Stats(stats=stats))
        yield None
        assert sockets.take("front", FRONT) == [], "it has had its answer"
        sockets.put("front", FRONT, m.FleetSnapshotQuery())
        yield None
        (second,) = sockets.take("front", FRONT)
        assert [(link.source, link.target, link.num_bytes) for link in second.links] == [(0, 1, 10), (1, 0, 11)]
        sockets.shut_down()
        yield None

    run(sockets, script())


# --- the end ----------------------------------------------------------------------------------------------------------


def test_rank_0_can_end_the_job_in_order(sockets: Sockets) -> None:
    def script() -> Script:
        yield from sockets.come_up()
        yield [(PARENT, 1)]

    run(sockets, script(), line=final_status.SHUT_DOWN)
    assert [message for *_, message in sockets.sent if isinstance(message, m.Shutdown)] == [m.Shutdown()] * 2


def test_rank_0_may_end_the_job_before_the_driver_reads_its_arguments(tmp_path: Path) -> None:
    """Both lines are there at once, and the pipe stays open: reading the first one must leave the second."""
    begin = msgspec.json.encode(make_args(tmp_path)) + b"\n" + final_status.SHUT_DOWN
    reader, writer = os.pipe()
    os.write(writer, begin)
    with subprocess.Popen(start.command("hetis.driver.driver"), stdin=reader, stdout=subprocess.PIPE) as process:
        try:
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()
            os.close(reader)
            os.close(writer)


@pytest.mark.parametrize(
    ("line", "words"), [(b"", "was killed by SIGKILL"), (final_status.ASKED_TO_END, "asked to end")]
)
def test_the_end_of_rank_0_is_the_end_of_the_fleet(
    line: bytes, words: str, sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "await_status", lambda pid, seconds: 9)

    def script() -> Script:
        yield from sockets.come_up()
        yield [(PARENT, 1)]
        if not line:  # it has died, which ranks may explain in the grace period
            sockets.now += GRACE_SECONDS + 1
            yield None

    reason = run_failing(sockets, script(), line)
    assert words in reason.text
    assert "rank 0" in reason.text


def test_heartbeats_are_answered(sockets: Sockets) -> None:
    def script() -> Script:
        yield from sockets.come_up()
        sockets.put("health", b"1", m.Heartbeat(rank=1, step=3))
        yield None
        assert sockets.take("health", b"1") == [m.Pong()]
        sockets.shut_down()
        yield None

    run(sockets, script())


def test_a_failure_is_sent_to_all_once(sockets: Sockets) -> None:
    def script() -> Script:
        yield from attach(sockets, FRONT)
        sockets.put("health", b"1", m.Failure(rank=1, reason="MemoryError: no more", traceback="Traceback …"))
        yield None

    reason = run_failing(sockets, script())
    assert reason == FailureReason("rank 1 (attention worker on cpu) failed: MemoryError: no more")
    assert sockets.take("front", FRONT) == [m.EngineDead(reason=reason.text)]
    for rank in (b"0", b"1"):
        assert m.Abort(reason=reason.text) in sockets.take("health", rank)


def test_a_silent_rank_is_killed_by_others_of_its_host(sockets: Sockets) -> None:
    def script() -> Script:
        yield from sockets.come_up()
        sockets.now += 9.0
        sockets.put("health", b"0", m.Heartbeat(rank=0, step=-1))
        yield None
        sockets.now += 2.0
        yield None

    reason = run_failing(sockets, script(), step_timeout=10.0)
    assert "rank 1" in reason.text
    assert m.Abort(reason=reason.text, host="elsewhere", pids_to_kill=[1001]) in sockets.take("health", b"0")
