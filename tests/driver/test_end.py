"""How a job ends, in order, with rank 0, or because a rank failed, and what ranks and front ends then get."""

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from hetis.core import messages as m
from hetis.driver import final_status
from hetis.driver.watch import GRACE_SECONDS
from hetis.engine.engine import Engine
from hetis.processes import start, supervision
from hetis.processes.failure import FailureReason
from tests.driver.scripted import FRONT, PARENT, Script, Sockets, attach, make_args, run, run_failing
from tests.processes.look import DEADLINE


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
        sockets.put("front", FRONT, m.Shutdown())
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
