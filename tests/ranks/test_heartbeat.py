"""The heartbeat thread of a rank, in a process of its own: what it sends, and when and how it ends the process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hetis.comm.control import ControlServer
from hetis.core import messages as m
from hetis.processes import failure, supervision
from tests.comm.control_helpers import take
from tests.processes.look import DEADLINE


@pytest.fixture(params=[None, "127.0.0.1"])
def server(request: pytest.FixtureRequest, directory: Path) -> Iterator[ControlServer]:
    """On unix sockets, and on TCP."""
    server = ControlServer(str(directory), request.param)
    yield server
    server.close()


RANK = """
import signal, sys, threading
from hetis.core import messages as m
from hetis.processes.waker import Waker
from hetis.ranks.heartbeat import Heartbeat

waker = Waker()
waker.wake_on(signal.SIGTERM, signal.SIGINT)
heartbeat = Heartbeat(sys.argv[1], 5, waker, lambda how: print("lost:", how, flush=True), prints_reason=True)
heartbeat.timeout = float(sys.argv[2])
heartbeat.start()
print("up", flush=True)
word = sys.stdin.readline().strip()
if word == "fail":
    heartbeat.report(m.Failure(rank=5, reason="because", traceback="…"))
    threading.Event().wait()
if word == "stop":
    heartbeat.stop()
"""


@pytest.fixture
def rank(server: ControlServer, tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    """A process whose first heartbeat has come."""
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
    """Answers heartbeats like the driver, until a message of type `until` comes."""
    while True:
        identity, message = take(server, "health")
        if isinstance(message, until):
            return message
        server.send("health", identity, m.Pong())


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process that ends itself: its standard input stays open."""
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


def test_an_abort_kills_the_named_processes_of_the_host(server: ControlServer, rank: "subprocess.Popen[str]") -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as here:
        os.kill(here.pid, signal.SIGSTOP)
        server.send("health", b"5", m.Abort(reason="", host=supervision.host_id(), pids_to_kill=[here.pid]))
        assert here.wait(DEADLINE) == -signal.SIGKILL
    assert finish(rank)[0] == 1


def test_a_failure_is_reported_before_the_end(server: ControlServer, rank: "subprocess.Popen[str]") -> None:
    assert rank.stdin is not None
    rank.stdin.write("fail\n")
    rank.stdin.flush()
    assert answer(server, m.Failure) == m.Failure(rank=5, reason="because", traceback="…")
    server.send("health", b"5", m.Abort(reason="rank 5 failed."))
    assert finish(rank)[0] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launchers_signal_is_reported_and_the_failure_reason_awaited(
    server: ControlServer, rank: "subprocess.Popen[str]", number: int
) -> None:
    """The main thread of this rank is in a system call."""
    rank.send_signal(number)
    assert answer(server, m.Failure) == m.Failure(rank=5, reason=failure.END_REQUESTED, is_consequence=True)
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


def test_a_heartbeat_thread_that_is_stopped_leaves_the_process_running(
    server: ControlServer, rank: "subprocess.Popen[str]"
) -> None:
    assert rank.stdin is not None
    rank.stdin.write("stop\n")
    rank.stdin.flush()
    assert finish(rank) == (0, "", "")
