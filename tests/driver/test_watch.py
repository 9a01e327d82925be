"""One failure reason from many signs, on a clock of the test."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hetis.core.device_info import DeviceInfo
from hetis.core.messages import Failure
from hetis.core.plan import AttentionWorker, Plan, Primary, Stage
from hetis.driver.watch import GRACE_SECONDS, JOIN_SECONDS, SILENT_SECONDS, FleetFailedError, Watch
from hetis.processes import supervision
from hetis.processes.failure import END_REQUESTED, FailureReason

TIMEOUT = 10.0
PRIMARY = Primary(rank=0, device="cpu", groups=(0, 1), mlp_columns=(0, 1), vocab_rows=(0, 1))
PLAN = Plan(
    stages=(Stage(layers=(0, 1), primaries=(PRIMARY,)),),
    workers=(AttentionWorker(rank=1, device="cpu"), AttentionWorker(rank=2, device="cpu")),
)


class Fleet:
    """A watch whose ranks are on another host, unless they get a process."""

    def __init__(self, joined: tuple[int, ...] = (0, 1, 2)) -> None:
        self.now = 100.0
        self.watch = Watch(PLAN, TIMEOUT, clock=lambda: self.now)
        for rank in joined:
            self.join(rank)

    def join(self, rank: int, pid: int = 0) -> int | None:
        host = supervision.host_id() if pid else "elsewhere"
        info = DeviceInfo(
            rank=rank, device="cuda:3", name="", host=host, address="", pid=pid or 1000 + rank, num_threads=1,
            total_memory=1, free_memory=1,
        )  # fmt: skip
        return self.watch.on_hello(info)

    def beat(self, *ranks: int, step: int = 0) -> None:
        for rank in ranks:
            self.watch.on_heartbeat(rank, step)

    def fail(self, rank: int, reason: str, traceback: str = "", is_consequence: bool = False) -> None:
        self.watch.on_failure(Failure(rank=rank, reason=reason, traceback=traceback, is_consequence=is_consequence))

    def error(self, after: float = GRACE_SECONDS + 0.1) -> FleetFailedError:
        """The error after so many seconds, when there was none before, in the grace period."""
        self.watch.check()
        self.now += after
        with pytest.raises(FleetFailedError) as caught:
            self.watch.check()
        return caught.value


@pytest.fixture
def process() -> "Iterator[subprocess.Popen[bytes]]":
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def end(fleet: Fleet, rank: int, process: "subprocess.Popen[bytes]", signal: int) -> None:
    """The process of `rank` ends by a signal, and stays a zombie: its parent has not waited for it."""
    fd = fleet.join(rank, process.pid)
    assert fd is not None
    os.kill(process.pid, signal)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    fleet.watch.on_death(fd)


def test_a_healthy_fleet_is_left_alone() -> None:
    fleet = Fleet()
    for step in range(5):
        fleet.now += TIMEOUT * 0.9
        fleet.beat(0, 1, 2, step=step)
        fleet.watch.on_step(step)
        fleet.watch.check()
        fleet.watch.on_result(step)


def test_a_ranks_own_error_is_the_reason_at_once() -> None:
    fleet = Fleet()
    fleet.fail(0, "connection to rank 1 lost", is_consequence=True)
    fleet.watch.check()
    fleet.fail(1, "MemoryError: none left", traceback="Traceback …")
    with pytest.raises(FleetFailedError, match=r"rank 1 \(attention worker on cuda:3\) failed: MemoryError: none left"):
        fleet.watch.check()


def test_an_error_without_a_traceback_is_a_mistake_of_the_user() -> None:
    fleet = Fleet()
    fleet.fail(1, "model.safetensors is cut off; download it again.")
    with pytest.raises(FleetFailedError) as caught:
        fleet.watch.check()
    assert caught.value.reason == FailureReason("model.safetensors is cut off; download it again.", refused=True)


def test_a_death_explains_lost_connections(process: "subprocess.Popen[bytes]") -> None:
    fleet = Fleet((0, 1))
    fleet.fail(0, "the connection was lost", is_consequence=True)
    end(fleet, 2, process, 9)
    assert str(fleet.error()) == (
        "rank 2 (attention worker on cuda:3) was killed by SIGKILL, perhaps because memory ran out."
    )


def test_a_rank_that_was_asked_to_end_is_not_the_cause(process: "subprocess.Popen[bytes]") -> None:
    fleet = Fleet((0, 1))
    end(fleet, 2, process, 15)
    fleet.fail(1, END_REQUESTED, is_consequence=True)
    fleet.fail(0, "the connection was lost", is_consequence=True)
    assert "rank 0 (primary on cuda:3) failed: the connection was lost" in str(fleet.error())


def test_if_all_were_asked_to_end_that_is_the_reason() -> None:
    fleet = Fleet()
    for rank in range(3):
        fleet.fail(rank, END_REQUESTED, is_consequence=True)
    error = str(fleet.error())
    assert error.count("rank") == 3
    assert END_REQUESTED in error


def test_a_rank_that_never_joined_is_suspected_when_the_others_are_asked_to_end() -> None:
    fleet = Fleet((0, 1))
    fleet.fail(0, END_REQUESTED, is_consequence=True)
    assert "rank 2 (attention worker on cpu) ended before the fleet was up" in str(fleet.error())


def test_a_silent_rank_is_named_with_the_pid_to_kill() -> None:
    fleet = Fleet()
    fleet.now += TIMEOUT * 0.9
    fleet.beat(0, 2)
    error = fleet.error(TIMEOUT * 0.2)
    assert "rank 1 (attention worker on cuda:3) did not answer within --step-timeout (10 s)" in str(error)
    assert error.pids_to_kill == {"elsewhere": [1001]}


def test_ranks_that_wait_for_a_silent_one_are_not_named() -> None:
    """The step is late before the silence is long enough; so is the report of a peer that waits less."""
    fleet = Fleet()
    fleet.watch.on_step(7)
    fleet.now += 1.0
    fleet.beat(1, step=6)
    fleet.now += TIMEOUT - 1.0
    fleet.beat(0, 2, step=6)
    assert "rank 1 (attention worker on cuda:3) has not answered for 9.1 s" in str(fleet.error(0.1))
    fleet = Fleet()
    fleet.now += SILENT_SECONDS
    fleet.beat(0, 2)
    fleet.fail(0, "rank 1 does not answer", is_consequence=True)
    assert "rank 1 (attention worker on cuda:3) has not answered for 3.1 s" in str(fleet.error())


def test_a_late_step_names_the_ranks_that_are_behind() -> None:
    fleet = Fleet()
    fleet.watch.on_step(7)
    fleet.now += TIMEOUT
    fleet.beat(0, step=7)
    fleet.beat(1, 2, step=6)
    error = str(fleet.error(0.1))
    assert "rank 1" in error
    assert "rank 2" in error
    assert "did not finish step 7 within --step-timeout (10 s)" in error
    assert "rank 0" not in error


def test_ranks_that_never_join_are_named() -> None:
    fleet = Fleet((0,))
    fleet.now += JOIN_SECONDS
    fleet.beat(0)
    assert "rank 1 (attention worker on cpu), rank 2 (attention worker on cpu) did not join" in str(fleet.error(0.1))


def test_living_ranks(process: "subprocess.Popen[bytes]") -> None:
    fleet = Fleet((0, 1))
    fd = fleet.join(2, process.pid)
    assert fleet.watch.living() == [0, 1, 2]
    fleet.now += 2.0
    fleet.beat(1)
    assert fleet.watch.living() == [1, 2], "elsewhere a rank lives by its heartbeat, here by its process"
    assert fleet.watch.pid_here(2) == process.pid
    assert fleet.watch.pid_here(1) is None
    process.kill()
    process.wait()
    assert fd is not None
    fleet.watch.on_death(fd)
    assert fleet.watch.living() == [1]


def test_when_rank_0_is_asked_to_end_while_loading_the_reason_comes_at_once() -> None:
    """No rank is left to explain, and the launcher ends before the grace period does."""
    fleet = Fleet(())
    fleet.watch.on_parent_death(15)
    with pytest.raises(FleetFailedError) as caught:
        fleet.watch.check()
    assert "rank 1 (attention worker on cpu), rank 2 (attention worker on cpu) ended before" in str(caught.value)
    fleet = Fleet(())
    fleet.watch.on_parent_death(9)
    assert str(fleet.error()).startswith("rank 0 (primary on cpu) was killed by SIGKILL")


def test_a_rank_that_ended_after_its_hello_is_named() -> None:
    """It was gone before there was a descriptor of its process."""
    fleet = Fleet((0, 2))
    assert fleet.join(1, pid=2**22 - 1) is None
    assert "rank 1 (" in str(fleet.error())
