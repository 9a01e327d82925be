"""How a job ends, in order, with rank 0, or because a rank failed, and what ranks and front ends then get."""

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from hetis.core import messages as m
from hetis.core.config import JOB
from hetis.driver.watch import GRACE_SECONDS, REQUEST_GRACE_SECONDS, REQUEST_SECONDS
from hetis.engine.engine import Engine
from hetis.processes import start
from hetis.processes.failure import FailureReason
from tests.driver.scripted import AGENT, END, FRONT, OTHER_AGENT, Script, Sockets, attach, make_args, run, run_failing
from tests.processes.look import DEADLINE


def test_a_value_error_of_a_fleet_that_is_up_is_no_mistake_of_the_user(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def raise_error(engine: Engine, now: float) -> None:
        raise ValueError("planted")

    def script() -> Script:
        yield from sockets.come_up()
        monkeypatch.setattr(Engine, "step", raise_error)
        yield None

    assert run_failing(sockets, script()) == FailureReason("the driver failed: ValueError: planted")
    assert "Traceback" in caplog.text


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
