"""The driver from the first hello to the end, with sockets of the test: which messages go where, and when.

Whenever the driver waits, the script of the test goes on by one step, so nothing depends on time.
"""

import os
import re
import subprocess
from collections import defaultdict, deque
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hetis.core import messages as m
from hetis.core.config import JOB, DriverArgs, EngineConfig
from hetis.core.device_info import DeviceInfo, RankStats
from hetis.core.measurements import AttentionSample, DenseSample, PrefillSample, TransferSample
from hetis.core.messages.step_command import decode
from hetis.core.plan_sources import resolve_plan
from hetis.core.sampling_params import SamplingParams
from hetis.driver import members, serving
from hetis.driver.driver import run_job
from hetis.driver.members import Members
from hetis.driver.watch import GRACE_SECONDS, REQUEST_GRACE_SECONDS, REQUEST_SECONDS, Watch
from hetis.engine.engine import Engine
from hetis.processes import start
from hetis.processes.failure import FailureReason, FailureRecord
from tests.dispatcher.fleets import make_spec
from tests.processes.look import DEADLINE

SPEC = msgspec.structs.replace(make_spec(4, num_layers=4), intermediate_size=128, vocab_size=512, max_position=256)
OWNER = 1000  # a descriptor that only the fake poller knows
END = [(OWNER, 1)]  # what the poller returns when the agent ends the job
TO_RANK = m.Setup | m.Measure | m.MeasureLink | m.StepCommand | m.StatsQuery | m.Shutdown
Script = Generator[list[tuple[object, int]] | None, None, None]
FRONT, OTHER_FRONT, THIRD_FRONT = b"front", b"other", b"third"
AGENT, OTHER_AGENT = b"agent-0", b"agent-1"


class Sockets:
    """A stand-in for ControlServer and its poller: keeps what the driver sends, gives it what the script has put."""

    def __init__(self, directory: Path) -> None:
        """`directory`: of the run."""
        self.poller, self.directory = self, directory
        self.script: Script  # set by `run`
        self.script_error: AssertionError | None = None  # which the driver takes for a failure of its own
        self.now = 0.0
        self.sent: list[tuple[str, bytes, Any]] = []
        self._inbox: dict[str, deque[tuple[bytes, m.Message]]] = defaultdict(deque)
        self._decoder = msgspec.msgpack.Decoder(TO_RANK)

    # --- the driver's side

    def register(self, what: object, flags: int = 0) -> None: ...

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

    # --- the script's side

    def put(self, client: str, identity: bytes, *messages: m.Message) -> None:
        self._inbox[client].extend((identity, message) for message in messages)

    def take(self, client: str, identity: bytes) -> list[Any]:
        """Messages to one client since the last time."""
        taken = [message for where, whom, message in self.sent if (where, whom) == (client, identity)]
        self.sent = [each for each in self.sent if each[:2] != (client, identity)]
        return taken

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
        """Takes the one command that both ranks must have been given; every row that samples draws token 7."""
        (command,), (same,) = self.take("ranks", b"0"), self.take("ranks", b"1")
        assert command == same
        tokens = [7] * len(decode(command, 0).sampling_row_I)
        self.put("ranks", b"0", m.StepResult(step=command.step, tokens=tokens))
        return command


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sockets:
    found = Sockets(tmp_path)
    monkeypatch.setattr(members, "Watch", lambda plan, timeout: Watch(plan, timeout, clock=lambda: found.now))
    monkeypatch.setattr(serving, "END_SECONDS", 0.0)
    return found


def make_args(directory: Path, *, measure: bool = False, **options: Any) -> DriverArgs:
    """For a fleet of 1+1."""
    config = EngineConfig(
        plan="1+1", device="cpu", kv_cache_memory=1 << 20, max_model_len=64, profile_cache=False,
        **({"dispatch": "even"} | options),
    )  # fmt: skip
    plan = resolve_plan(config.plan, SPEC, config.device, config.kv_cache_memory)
    return DriverArgs(
        config=config, measure=measure, spec=SPEC, plan=plan, eos_token_ids=[3], run_directory=str(directory),
        address=None,
    )  # fmt: skip


def run(sockets: Sockets, script: Script, **options: Any) -> None:
    """Runs a job that ends in order, with the script, which must have ended, too."""
    assert exit_code(sockets, script, **options) == 0
    assert FailureRecord(sockets.directory).read() is None


def run_failing(sockets: Sockets, script: Script, **options: Any) -> FailureReason:
    """Runs a job that fails; the recorded reason."""
    assert exit_code(sockets, script, **options) == 1
    reason = FailureRecord(sockets.directory).read()
    assert reason is not None
    return reason


def exit_code(sockets: Sockets, script: Script, **options: Any) -> int:
    args, sockets.script = make_args(sockets.directory, **options), script
    code = run_job(args, Members(args, sockets, OWNER))  # type: ignore[arg-type]
    if sockets.script_error is not None:
        raise sockets.script_error
    assert next(script, "the end") == "the end", "the driver ended before the script"
    return code


def request(name: str, **params: Any) -> m.AddRequest:
    return m.AddRequest(id=name, token_ids=[1, 2, 5], params=SamplingParams(**({"max_tokens": 2} | params)))


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
        yield END

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
        sockets.put("front", FRONT, m.Attach())
        yield from sockets.come_up()
        (ready,) = sockets.take("front", FRONT)
        assert (ready.max_model_len, ready.vocab_size, ready.eos_token_ids) == (64, 512, [3])
        sockets.put("front", OTHER_FRONT, m.Attach())
        yield None
        assert sockets.take("front", OTHER_FRONT) == [ready]
        yield END

    run(sockets, script())


def test_requests_before_the_fleet_is_up_are_refused_and_questions_wait(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("front", FRONT, m.Attach(), request("early"), m.AbortRequest(id="early"))
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
        yield END

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
    sockets.put("front", FRONT, m.Attach())
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
        yield END

    run(sockets, script(), dispatch="hetis")


def test_measuring_can_be_asked_for_where_placement_does_not_depend_on_it(sockets: Sockets) -> None:
    def script() -> Script:
        yield from start_measuring(sockets)
        assert [type(message) for message in sockets.take("ranks", b"0")] == [m.Measure]
        yield END

    run(sockets, script(), dispatch="even", measure=True)


def test_a_fleet_that_is_shut_down_while_it_measures_ends_its_ranks(sockets: Sockets) -> None:
    """Ranks read messages when they have measured; their agents end those that take too long."""

    def script() -> Script:
        sockets.put("agents", AGENT, m.AgentHello(ranks=[0, 1]))
        yield from start_measuring(sockets)
        assert [type(message) for message in sockets.take("ranks", b"0")] == [m.Measure]
        yield END

    run(sockets, script(), dispatch="hetis")
    assert sockets.take("ranks", b"0") == sockets.take("ranks", b"1") == [m.Shutdown()]
    assert sockets.take("agents", AGENT) == [m.End(reason=None)]


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
        sockets.put("front", front, m.Attach())
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
        yield END

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
        yield END

    run(sockets, script())


def test_a_request_that_can_never_run_is_refused_and_the_others_go_on(sockets: Sockets) -> None:
    def script() -> Script:
        yield from attach(sockets, FRONT)
        endless = m.AddRequest(id="endless", token_ids=[1] * 100_000, params=SamplingParams())
        sockets.put("front", FRONT, endless, request("good", max_tokens=1))
        yield None
        (refused,) = sockets.take("front", FRONT)[0].outputs
        assert (refused.id, refused.finish_reason) == ("endless", "error")
        sockets.answer_step()
        yield None
        assert [one.finish_reason for each in sockets.take("front", FRONT) for one in each.outputs] == ["length"]
        yield END

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
        yield END

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
        yield END

    run(sockets, script())


# --- the end ----------------------------------------------------------------------------------------------------------


def test_the_agent_can_end_the_job_in_order(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("agents", AGENT, m.AgentHello(ranks=[0]))
        yield from sockets.come_up()
        sockets.put("agents", OTHER_AGENT, m.AgentHello(ranks=[1]))  # the last message before the end
        yield END

    run(sockets, script())
    assert [message for *_, message in sockets.sent if isinstance(message, m.Shutdown)] == [m.Shutdown()] * 2
    assert sockets.take("agents", AGENT) == sockets.take("agents", OTHER_AGENT) == [m.End(reason=None)]


def test_the_agent_may_end_the_job_before_the_driver_reads_its_arguments(tmp_path: Path) -> None:
    (tmp_path / JOB).write_bytes(msgspec.json.encode(make_args(tmp_path)))
    command = start.command("hetis.driver.driver", str(tmp_path), str(os.getpid()))
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()


def test_questions_of_agents_are_answered_and_heartbeats_are_not(sockets: Sockets) -> None:
    def script() -> Script:
        yield from sockets.come_up()
        sockets.put("health", b"1", m.Heartbeat(rank=1, step=3))
        sockets.put("agents", AGENT, m.Ping())
        yield None
        assert sockets.take("agents", AGENT) == [m.Pong()]
        assert sockets.sent == []
        yield END

    run(sockets, script())


def test_values_go_from_rank_to_rank_at_any_time(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("board", b"1", m.LookUp(key="link"))
        yield None
        assert sockets.sent == []
        yield from sockets.come_up()
        sockets.put("board", b"0", m.Publish(key="link", value=b"here"))
        yield None
        assert sockets.take("board", b"1") == [m.Published(key="link", value=b"here")]
        assert sockets.sent == []
        sockets.put("board", b"0", m.LookUp(key="link"))
        yield None
        assert sockets.take("board", b"0") == [m.Published(key="link", value=b"here")]
        yield END

    run(sockets, script())


def test_a_failure_is_sent_to_all_once(sockets: Sockets) -> None:
    def script() -> Script:
        sockets.put("agents", AGENT, m.AgentHello(ranks=[0]))
        sockets.put("agents", OTHER_AGENT, m.AgentHello(ranks=[1]))
        yield from attach(sockets, FRONT)
        sockets.put("health", b"1", m.Failure(rank=1, reason="MemoryError: no more", traceback="Traceback …"))
        yield None

    reason = run_failing(sockets, script())
    assert reason == FailureReason("rank 1 (attention worker on cpu) failed: MemoryError: no more")
    assert sockets.take("front", FRONT) == [m.EngineDead(reason=reason.text)]
    assert sockets.take("agents", AGENT) == sockets.take("agents", OTHER_AGENT) == [m.End(reason=reason.text)]


def test_an_end_that_an_agent_has_seen_is_the_reason(sockets: Sockets) -> None:
    def script() -> Script:
        yield from sockets.come_up()
        sockets.put("health", b"0", m.Failure(rank=0, reason="connection lost", is_consequence=True))
        sockets.put("agents", AGENT, m.RankEnded(rank=1, status=9))
        yield None
        sockets.now += GRACE_SECONDS + 1
        yield None

    assert "rank 1 (attention worker on cpu) was killed by SIGKILL" in run_failing(sockets, script()).text


@pytest.mark.parametrize("reacts", [True, False])
def test_a_request_to_end_goes_to_the_root_which_decides(sockets: Sockets, reacts: bool) -> None:
    def script() -> Script:
        sockets.put("agents", AGENT, m.AgentHello(ranks=[0, 1]))
        yield from attach(sockets, FRONT)
        sockets.put("agents", AGENT, m.AskedToEnd())
        yield None
        for seconds, is_told in ((0.9 * REQUEST_GRACE_SECONDS, False), (0.2 * REQUEST_GRACE_SECONDS, True), (1, False)):
            sockets.now += seconds
            for rank in (0, 1):
                sockets.put("health", b"", m.Heartbeat(rank=rank, step=0))
            yield None
            assert sockets.take("front", FRONT) == ([m.EndRequested(reason=request_text)] if is_told else [])
        if reacts:
            yield END
        else:
            sockets.now += REQUEST_SECONDS
            yield None

    request_text = "rank 0 (primary on cpu), rank 1 (attention worker on cpu) was asked to end by its launcher."
    if reacts:
        run(sockets, script())
    else:
        assert run_failing(sockets, script()).text == request_text


def test_a_silent_rank_is_the_cause_when_the_others_are_asked_to_end(sockets: Sockets) -> None:
    """As when its whole host has gone: its launcher asks all others to end."""

    def script() -> Script:
        sockets.put("agents", AGENT, m.AgentHello(ranks=[0]))
        yield from attach(sockets, FRONT)
        sockets.put("agents", AGENT, m.AskedToEnd())
        yield None
        sockets.now += REQUEST_GRACE_SECONDS + 0.1
        sockets.put("health", b"0", m.Heartbeat(rank=0, step=0))
        yield None

    assert "rank 1 (attention worker on cpu) has not answered" in run_failing(sockets, script()).text
