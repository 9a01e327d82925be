"""The heartbeat thread of a rank, in a process of its own: what it sends, and when it ends the process."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hetis.comm.control import ControlServer
from hetis.core import messages as m
from tests.comm.control_helpers import take
from tests.processes.look import DEADLINE


@pytest.fixture(params=[None, "127.0.0.1"])
def server(request: pytest.FixtureRequest, directory: Path) -> Iterator[ControlServer]:
    """On unix sockets, and on TCP."""
    server = ControlServer(str(directory), request.param)
    yield server
    server.close()


RANK = """
import socket, sys, threading
from hetis.core import messages as m
from hetis.ranks.heartbeat import Heartbeat

agent, its = socket.socketpair()
heartbeat = Heartbeat(sys.argv[1], 5, its)
heartbeat.start()
print("up", flush=True)
word = sys.stdin.readline().strip()
if word == "fail":
    heartbeat.report(m.Failure(rank=5, reason="because", traceback="…"))
    threading.Event().wait()
if word == "lose agent":
    agent.close()
    threading.Event().wait()
if word == "stop":
    heartbeat.stop()
"""


@pytest.fixture
def rank(server: ControlServer) -> "Iterator[subprocess.Popen[str]]":
    """A process whose first heartbeat has come."""
    with subprocess.Popen(
        [sys.executable, "-c", RANK, server.endpoints.health],
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


def say(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def wait_for(server: ControlServer, kind: type[m.Message]) -> Any:
    while not isinstance(message := take(server, "health")[1], kind):
        pass
    return message


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process that ends itself: its standard input stays open."""
    code = process.wait(DEADLINE)
    assert process.stdout is not None
    assert process.stderr is not None
    return code, process.stdout.read(), process.stderr.read()


def test_a_rank_that_has_reported_a_failure_lives_until_its_agent_ends_it(
    server: ControlServer, rank: "subprocess.Popen[str]"
) -> None:
    say(rank, "fail")
    assert wait_for(server, m.Failure) == m.Failure(rank=5, reason="because", traceback="…")
    wait_for(server, m.Heartbeat)
    assert rank.poll() is None


def test_a_rank_ends_with_its_agent(server: ControlServer, rank: "subprocess.Popen[str]") -> None:
    say(rank, "lose agent")
    assert finish(rank) == (1, "", "")


def test_a_driver_that_ends_is_the_concern_of_the_agent(server: ControlServer, rank: "subprocess.Popen[str]") -> None:
    server.close()
    say(rank, "stop")
    assert finish(rank) == (0, "", "")


def test_a_heartbeat_thread_that_is_stopped_leaves_the_process_running(
    server: ControlServer, rank: "subprocess.Popen[str]"
) -> None:
    say(rank, "stop")
    assert finish(rank) == (0, "", "")
