"""Looking at processes that vanish between two looks."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from hetis.comm.shared_memory import Peer
from hetis.processes import supervision
from tests.launch.fleet_process import role_of
from tests.processes.look import Look, family, kill, look

NO_SUCH_PID = 2**22 - 1


@pytest.fixture
def zombie() -> Iterator["subprocess.Popen[bytes]"]:
    """Has ended; its parent has not waited for it yet."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield process


class Vanishing(psutil.Process):
    """This process, which is gone after some of the questions that it is asked."""

    def __init__(self, num_answers: int) -> None:
        super().__init__()
        self.num_answers = num_answers

    def _answer(self, what: Any) -> Any:
        self.num_answers -= 1
        if self.num_answers < 0:
            raise psutil.NoSuchProcess(self.pid)
        return what

    def cmdline(self) -> list[str]:
        return self._answer(["python", "-m", "hetis"])

    def environ(self) -> dict[str, str]:
        return self._answer({"RANK": "0"})

    def children(self, recursive: bool = False) -> list[psutil.Process]:
        return self._answer([])


@pytest.mark.parametrize("num_answers", [0, 1])
def test_a_process_that_vanishes_during_a_look_is_not_there(num_answers: int) -> None:
    assert look(Vanishing(num_answers)) is None


def test_a_process_that_stays_is_seen_whole() -> None:
    process = Vanishing(3)
    assert look(process) == Look(process, "python -m hetis", {"RANK": "0"})
    assert family(process) == [process]
    assert family(process) == [], "it vanished before it was asked for its children"


@pytest.mark.parametrize("emptied", ["cmdline", "environ"])
def test_a_process_that_is_ending_is_not_there(emptied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has freed its memory, with the command and the environment, and it does not count as ended yet."""
    monkeypatch.setattr(psutil.Process, emptied, lambda _: [] if emptied == "cmdline" else {})
    assert look(psutil.Process()) is None


def test_a_zombie_is_not_there(zombie: "subprocess.Popen[bytes]") -> None:
    process = psutil.Process(zombie.pid)
    assert look(process) is None
    kill(process)
    zombie.wait()
    assert family(process) == []
    assert look(process) is None
    kill(process)


def test_roles_need_no_environment() -> None:
    """A process of a fleet before it has replaced its parent's image, or after its memory has gone."""
    for command, role in (("hetis.launch.member /tmp/x 1", "rank 2"), ("-m hetis generate", "agent 2")):
        assert role_of(Look(psutil.Process(), command, {"RANK": "2"})) == role
        assert role_of(Look(psutil.Process(), command, {"PATH": ""})) in {None, "front"}


# --- what hetis itself looks at ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_a_peer_that_is_a_zombie_or_gone_is_dead(
    has_pidfd: bool, zombie: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    peers = [Peer(1, os.getpid()), Peer(2, zombie.pid), Peer(3, NO_SUCH_PID)]
    assert [peer.is_alive() for peer in peers] == [True, False, False]
    with pytest.raises(ConnectionError, match="was killed by SIGKILL"):
        peers[1].check()
    for peer in peers:
        peer.close()


def test_another_users_process_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not supervision.has_ended(os.getpid())


def test_ends_are_seen_before_and_after_they_are_reaped(zombie: "subprocess.Popen[bytes]") -> None:
    assert not supervision.has_ended(os.getpid())
    assert supervision.has_ended(zombie.pid)
    assert supervision.wait_status(zombie.pid) == signal.SIGKILL
    zombie.wait()
    assert supervision.has_ended(zombie.pid)
    assert supervision.wait_status(zombie.pid) is None
    supervision.kill([zombie.pid, NO_SUCH_PID])
