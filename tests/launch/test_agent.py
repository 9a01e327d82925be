"""An agent with stand-ins for its children and for the driver: what it says, and what it does to whom."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from hetis.comm.control import ControlServer
from hetis.core import messages as m
from hetis.core.config import Joining
from hetis.processes.failure import FailureRecord
from tests.comm.control_helpers import take
from tests.processes.look import DEADLINE, family, kill, wait_until

# Arguments: directory, what starts (driver, ranks), step timeout. Children print who they are and what they have read.
AGENT = """
import os, sys
from hetis.launch import agent
from hetis.processes.failure import FailureRecord

def command(module, *arguments):
    return [sys.executable, "-c", CHILD, module]

CHILD = '''
import os, subprocess, sys
name = "driver" if "driver" in sys.argv[1] else "rank " + os.environ["RANK"]
if name == "driver":
    os.write(1, os.environ["JOINING"].encode())
    os.read(0, 1)
    sys.exit(0)
line = os.environ["JOINING"].encode()
if os.environ["FROM_RANK"] == "1":
    if "IS_LATE" not in os.environ:
        os.write(0, line)
else:
    line = os.read(0, 65536)
if os.environ.get("LEAVES_ORPHAN"):
    os.write(1, f"orphan {subprocess.Popen(['sleep', '1000']).pid}{os.linesep}".encode())
os.write(1, f"{name} {os.getpid()} {line.decode()}".encode())
os.read(0, 1)
'''
agent.start.command = command
directory, timeout = sys.argv[1], float(sys.argv[2])
agent.begin(os.getppid())
it = agent.Agent(directory, [0], timeout, "rank {}".format, FailureRecord(directory).write)
if os.environ["FROM_RANK"] == "0":
    it.children.start_driver()
for rank in (0, 1):
    it.start_rank(rank, os.environ | {"RANK": str(rank)})
if os.environ.get("RESTARTS"):
    on_end = it._on_end

    def restart(child, status):
        it.start_rank(child, os.environ | {"RANK": "7"})
        it._on_end = on_end

    it._on_end = restart
print("up", flush=True)
code = it.run()
print("end", flush=True)
os._exit(code)
"""


class AgentProcess:
    """An agent of two ranks. `server`: the driver's sockets, which the test has."""

    def __init__(self, server: ControlServer, directory: Path, timeout: float, **variables: str) -> None:
        self.server, self.directory = server, directory
        joining = msgspec.json.encode(Joining(endpoints=server.endpoints, devices=["cpu"] * 2)).decode() + "\n"
        variables = {"FROM_RANK": "0", "JOINING": joining} | variables
        self.process = subprocess.Popen(
            [sys.executable, "-c", AGENT, str(directory), str(timeout)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | variables,
        )  # fmt: skip

        self._seen = psutil.Process(self.process.pid)
        self._leaves_orphans = "LEAVES_ORPHAN" in variables

    def family(self) -> list[psutil.Process]:
        """The agent and all below it."""
        return family(self._seen)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ranks(self) -> dict[int, psutil.Process]:
        """Both ranks, when both have read `Joining`, and the agent has said hello."""
        lines = sorted(self.line() for _ in range(3 + 2 * self._leaves_orphans))[2 * self._leaves_orphans :]
        assert lines[-1] == "up"
        assert [line.split()[1] for line in lines[:2]] == ["0", "1"]
        assert all(json.loads(line.split(maxsplit=3)[3])["devices"] == ["cpu", "cpu"] for line in lines[:2])
        assert self.message() == m.AgentHello(ranks=[0, 1])
        for _ in range(2):  # when it asks again it has heard the first answer
            assert take(self.server, "agents")[1] == m.Ping()
            self.send(m.Pong())
        return {int(line.split()[1]): psutil.Process(int(line.split()[2])) for line in lines[:2]}

    def message(self) -> Any:
        """The next message of the agent but questions, which are answered."""
        while isinstance(message := take(self.server, "agents")[1], m.Ping):
            self.send(m.Pong())
        return message

    def send(self, message: m.Message) -> None:
        self.server.send("agents", b"agent-0", message)

    def finish(self) -> tuple[int, str | None]:
        """(exit code, recorded reason)"""
        code = self.process.wait(DEADLINE)
        recorded = FailureRecord(self.directory).read()
        return code, None if recorded is None else recorded.text


@contextmanager
def running(directory: Path, timeout: float = 60.0, **variables: str) -> Iterator[AgentProcess]:
    server = ControlServer(str(directory), None)
    agent = AgentProcess(server, directory, timeout, **variables)
    try:
        yield agent
    finally:
        for process in agent.family():
            kill(process)
        agent.process.wait()
        server.close()


@pytest.mark.parametrize("source", ["driver", "rank"])
def test_the_end_of_a_rank_is_told_with_its_wait_status_and_the_driver_decides(directory: Path, source: str) -> None:
    with running(directory, FROM_RANK=str(int(source == "rank"))) as agent:
        ranks = agent.ranks()
        ranks[0].send_signal(signal.SIGSTOP)
        ranks[1].kill()
        assert agent.message() == m.RankEnded(rank=1, status=signal.SIGKILL)
        agent.send(m.End(reason="because."))
        assert agent.finish() == (1, "because.")
        assert not ranks[0].is_running()


def test_before_there_is_a_fleet_the_end_of_the_rank_is_the_reason(directory: Path) -> None:
    with running(directory, FROM_RANK="1", IS_LATE="1") as agent:
        wait_until(lambda: len(agent.family()) == 3, "both ranks run")
        agent.family()[2].kill()
        code, reason = agent.finish()
        assert code == 1
        assert reason is not None
        assert reason.startswith("rank 1 was killed by SIGKILL")


def test_in_order_ranks_have_some_time(directory: Path) -> None:
    with running(directory) as agent:
        ranks = agent.ranks()
        ranks[0].send_signal(signal.SIGSTOP)
        agent.send(m.End(reason=None))
        assert agent.finish() == (0, None)
        assert not ranks[0].is_running()


def test_the_root_ends_all_by_closing_the_pipe(directory: Path) -> None:
    with running(directory, LEAVES_ORPHAN="1") as agent:
        agent.ranks()
        children = agent.family()[1:]
        assert len(children) == 5, "a driver, two ranks, and a child of each rank"
        assert agent.process.stdin is not None
        agent.process.stdin.close()
        assert agent.line() == "end", "the driver has ended, and ranks were killed when their time was over"
        assert not any(child.is_running() for child in children)
        assert agent.finish() == (0, None)


def test_a_driver_that_is_killed_is_the_reason(directory: Path) -> None:
    with running(directory) as agent:
        agent.ranks()
        children = agent.family()[1:]
        next(child for child in children if "hetis.driver.driver" in child.cmdline()).kill()
        assert agent.finish() == (1, "the driver was killed by SIGKILL, perhaps because memory ran out.")


def test_a_driver_that_is_silent_is_the_reason(directory: Path) -> None:
    with running(directory, 1.0) as agent:
        agent.ranks()
        assert agent.finish() == (1, "the driver has not answered for 1 s (stopped, or its host is gone).")


def test_the_end_of_a_driver_elsewhere_ends_the_ranks(directory: Path) -> None:
    with running(directory, FROM_RANK="1") as agent:
        agent.ranks()
        agent.server.close()
        assert agent.finish() == (1, "the driver ended.")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launchers_signal_is_a_request_and_children_do_not_get_it(directory: Path, number: signal.Signals) -> None:
    with running(directory) as agent:
        ranks = agent.ranks()
        for process in agent.family()[1:]:
            process.send_signal(number)
        agent.process.send_signal(number)
        assert agent.message() == m.AskedToEnd()
        agent.send(m.Pong())
        assert all(process.is_running() for process in ranks.values())
        agent.send(m.End(reason=None))
        assert agent.finish() == (0, None)


def test_a_rank_can_be_started_again(directory: Path) -> None:
    with running(directory, RESTARTS="1") as agent:
        agent.ranks()[1].kill()
        name, rank, _, joining = agent.line().split(maxsplit=3)
        assert (name, rank) == ("rank", "7")
        assert json.loads(joining)["devices"] == ["cpu", "cpu"]


def test_the_variables_of_a_rank_are_set_before_torch_and_the_users_own_values_stay(directory: Path) -> None:
    """CUDA reads the number of hardware queues when it is first used, so later is too late."""
    with running(directory, OMP_WAIT_POLICY="ACTIVE") as agent:
        found = agent.ranks()[0].environ()
        assert (found["CUDA_DEVICE_MAX_CONNECTIONS"], found["THP_MEM_ALLOC_ENABLE"]) == ("32", "1")
        assert found["OMP_WAIT_POLICY"] == "ACTIVE"
        assert "GOMP_SPINCOUNT" not in found, "it would decide instead of the policy"
