"""The control plane over real sockets, and the heart of a rank in a process of its own."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from hetis.comm.control import TOLD_TO_END, ControlClient, ControlServer
from hetis.core import messages as m
from hetis.processes import supervision
from tests.processes.look import DEADLINE, wait_until


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t"))  # short: sockets live in it
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=[None, "127.0.0.1"])
def server(request: pytest.FixtureRequest, directory: Path) -> Iterator[ControlServer]:
    """On unix sockets, and on TCP."""
    server = ControlServer(str(directory), request.param)
    yield server
    server.close()


def take(server: ControlServer, kind: Any) -> tuple[bytes, Any]:
    deadline = time.monotonic() + DEADLINE
    while (received := server.receive(kind)) is None:
        assert time.monotonic() < deadline
        server.poller.poll(50)
    return received


def test_messages_go_both_ways_in_order(server: ControlServer) -> None:
    client = ControlClient(server.endpoints.ranks, "3", "rank")
    for step in range(100):
        client.send(m.StepResult(step=step, tokens=[0] * 10))
    assert [take(server, "ranks")[1].step for _ in range(100)] == list(range(100))
    for _ in range(3):
        server.send("ranks", b"3", m.StatsQuery())
    server.send("ranks", b"3", m.Shutdown())
    assert [type(client.receive(DEADLINE)) for _ in range(4)] == [m.StatsQuery] * 3 + [m.Shutdown]
    assert client.receive(0) is None
    client.close()


def test_hidden_sockets_go_on_working(directory: Path) -> None:
    server = ControlServer(str(directory), None)
    client = ControlClient(server.endpoints.front, "front", "front")
    client.send(m.Attach())
    identity, _ = take(server, "front")
    assert {path.name for path in directory.iterdir()} == {"ranks", "health", "front"}
    server.hide()
    assert list(directory.iterdir()) == []
    server.send("front", identity, m.EngineDead(reason="none"))
    assert client.receive(DEADLINE) == m.EngineDead(reason="none")
    client.close()
    server.close()


def test_garbage_is_dropped(server: ControlServer) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(server.endpoints.ranks)
        for frames in ([b""], [b"\xff\xfe"], [b"a", b"b", b"c"], [b"\x81\xa4type\xa6Attach"]):
            stranger.send_multipart(frames)
        client = ControlClient(server.endpoints.ranks, "1", "rank")
        client.send(m.Ready(rank=1))
        assert take(server, "ranks") == (b"1", m.Ready(rank=1))
        client.close()
        stranger.close(linger=0)


def test_a_front_end_is_told_what_is_no_message(server: ControlServer) -> None:
    front = ControlClient(server.endpoints.front, "front", "front")
    front.send(m.StatsQuery())
    front.socket.send(b"\xff\xfe")
    front.send(m.Attach())
    assert take(server, "front") == (b"front", m.Attach()), "the driver goes on"
    for word in ("StatsQuery", ""):
        answer = front.receive(DEADLINE)
        assert isinstance(answer, m.Refused)
        assert word in answer.reason
    front.close()


def test_a_lost_driver_is_noticed_at_once(directory: Path) -> None:
    server = ControlServer(str(directory), None)
    client = ControlClient(server.endpoints.ranks, "1", "rank")
    assert not client.is_lost, "not connected is not lost"
    client.send(m.Ready(rank=1))
    take(server, "ranks")
    assert not client.is_lost
    server.close()
    wait_until(lambda: client.is_lost, "the loss is noticed")
    client.close(linger=0)


# --- the heart --------------------------------------------------------------------------------------------------------

RANK = """
import signal, sys, threading
from hetis.processes import supervision
from hetis.comm.control import Heart
from hetis.core import messages as m
from tests.processes.look import DEADLINE

waker = supervision.Waker()
waker.wake_on(signal.SIGTERM, signal.SIGINT)
heart = Heart(sys.argv[1], 5, waker, lambda how: print("lost:", how, flush=True), prints_verdict=True)
heart.timeout = float(sys.argv[2])
heart.start()
print("up", flush=True)
word = sys.stdin.readline().strip()
if word == "fail":
    heart.report(m.Failure(rank=5, reason="because", traceback="…"))
    threading.Event().wait()
if word == "stop":
    heart.stop()
"""


@pytest.fixture
def rank(server: ControlServer, tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    """A process with a heart, whose first heartbeat has come."""
    yield from start_rank(server, tmp_path, "60")


def start_rank(server: ControlServer, tmp_path: Path, timeout: str) -> "Iterator[subprocess.Popen[str]]":
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    with subprocess.Popen(
        [sys.executable, "-c", RANK, server.endpoints.health, timeout],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        identity, first = take(server, "health")
        assert (identity, first) == (b"5", m.Heartbeat(rank=5, step=-1))
        yield process
        process.kill()


def answer(server: ControlServer, until: type[m.Message]) -> Any:
    """Answers heartbeats like the driver, until another message comes."""
    while True:
        identity, message = take(server, "health")
        if isinstance(message, until):
            return message
        server.send("health", identity, m.Pong())


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Its end comes from inside: standard input stays open."""
    code = process.wait(DEADLINE)
    assert process.stdout is not None
    assert process.stderr is not None
    return code, process.stdout.read(), process.stderr.read()


def test_an_abort_ends_the_rank_with_the_reason(
    server: ControlServer, rank: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    server.send("health", b"5", m.Abort(reason="rank 2 died."))
    assert finish(rank) == (1, "", "hetis: rank 2 died.\n")
    assert "rank 2 died." in (tmp_path / "error.json").read_text()


def test_an_abort_kills_the_culprits_of_the_host(server: ControlServer, rank: "subprocess.Popen[str]") -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as here:
        os.kill(here.pid, signal.SIGSTOP)
        server.send("health", b"5", m.Abort(reason="", host=supervision.host_id(), culprits=[here.pid]))
        assert here.wait(DEADLINE) == -signal.SIGKILL
    assert finish(rank)[0] == 1


def test_a_failure_is_told_before_the_end(server: ControlServer, rank: "subprocess.Popen[str]") -> None:
    assert rank.stdin is not None
    rank.stdin.write("fail\n")
    rank.stdin.flush()
    assert answer(server, m.Failure) == m.Failure(rank=5, reason="because", traceback="…")
    server.send("health", b"5", m.Abort(reason="rank 5 failed."))
    assert finish(rank)[0] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launchers_signal_is_reported_and_the_verdict_awaited(
    server: ControlServer, rank: "subprocess.Popen[str]", number: int
) -> None:
    """The main thread of this rank sits in a system call."""
    rank.send_signal(number)
    failure = answer(server, m.Failure)
    assert failure == m.Failure(rank=5, reason=TOLD_TO_END, is_consequence=True)
    answer(server, m.Heartbeat)
    assert rank.poll() is None, "it waits"
    server.send("health", b"5", m.Abort(reason="rank 1 died."))
    assert finish(rank) == (1, "", "hetis: rank 1 died.\n")


def test_a_driver_that_ends_ends_the_rank(server: ControlServer, rank: "subprocess.Popen[str]") -> None:
    server.close()
    assert finish(rank) == (1, "lost: ended\n", "hetis: the driver ended.\n")


def test_a_silent_driver_ends_the_rank(server: ControlServer, tmp_path: Path) -> None:
    for process in start_rank(server, tmp_path, "0.5"):
        code, out, err = finish(process)
        assert code == 1
        assert "lost: has not answered for 0.5 s" in out
        assert "the driver has not answered" in err


def test_a_heart_that_is_stopped_ends_quietly(server: ControlServer, rank: "subprocess.Popen[str]") -> None:
    assert rank.stdin is not None
    rank.stdin.write("stop\n")
    rank.stdin.flush()
    assert finish(rank) == (0, "", "")


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_the_first_verdict_stays(tmp_path: Path) -> None:
    first, second = supervision.Verdict("one", refused=True), supervision.Verdict("two")
    assert supervision.read_verdict(tmp_path) is None
    assert supervision.leave_verdict(tmp_path, first)
    assert not supervision.leave_verdict(tmp_path, second)
    assert supervision.read_verdict(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["verdict"]


def test_a_verdict_on_a_directory_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert supervision.leave_verdict(tmp_path / "gone", supervision.Verdict("one"))


@pytest.mark.parametrize(
    ("number", "words", "by_request"),
    [
        (9, "was killed by SIGKILL", False),
        (15, "was killed by SIGTERM", True),
        (6, "was killed by SIGABRT", False),
        (40, "was killed by signal 40", False),  # Python has no name for it
    ],
)
def test_ends_by_signal(number: int, words: str, by_request: bool) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert supervision.wait_status(process.pid) is None
    process.send_signal(number)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    status = supervision.wait_status(process.pid)
    assert words in supervision.describe_end(status) == supervision.end_of(process.pid)
    assert supervision.ended_by_request(status) == by_request
    process.communicate()


def test_ends_by_code() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert supervision.end_of(process.pid) == "exited with code 3"
    process.wait()
    assert "without giving a reason" in supervision.end_of(process.pid)
