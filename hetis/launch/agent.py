"""The agent: parent of the processes of a fleet on one host, which sees every end, and ends what must end.

    python -m hetis.launch.agent DIRECTORY ROOT     child of the root: starts the driver and all ranks
    `run_under_torchrun`                            a process that torchrun started: starts one rank

Only agents have children, so each end is seen once, with its wait status:

    what happens                            what the agent does
    the root has closed its pipe, or ended  closes the driver's: the driver ends the ranks in order
    a rank ended                            tells the driver, which finds the cause
    the driver says that the fleet failed   kills its ranks
    the driver ended, or is silent          records that as the cause; kills its ranks
    a launcher asks for the end (SIGTERM)   tells the driver, which asks the root
    a limit of time is over                 kills all children that are left

It imports no torch, which would take a second of every start.
"""

import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from hetis.core import messages as m
from hetis.core.config import JOB, DriverArgs, Joining
from hetis.launch import torchrun
from hetis.processes import start, supervision
from hetis.processes.failure import (
    END_REQUESTED,
    FailureReason,
    FailureRecord,
    describe_end,
    member_name,
    report_to_torchrun,
    show,
)
from hetis.processes.waker import Waker

if TYPE_CHECKING:
    from hetis.comm.control import ControlClient

PING_SECONDS = 0.5  # between two questions whether the driver lives
END_SECONDS = 2.5  # that all children have to end in order
RANK_SECONDS = 1.5  # that ranks have of these after the driver
FAIL_SECONDS = 5.0  # that the driver has to explain the end of a rank
REQUEST_SECONDS = 28.0  # that the root has after a launcher's request; torchrun kills its processes after 30
DRIVER = -1  # beside ranks

RANK_DEFAULTS = {  # environment of a rank, read when torch is imported or CUDA is first used
    "OMP_WAIT_POLICY": "PASSIVE",  # ranks share cores with each other
    "THP_MEM_ALLOC_ENABLE": "1",  # huge pages for weights and cache: less time in page walks
    # A hardware queue for each stream (8 by default). If two streams shared one, the work of a stage could queue behind
    # the other's wait for a message that depends on it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}


class Agent:
    """Starts its children, and ends after the last of them."""

    def __init__(
        self,
        directory: str,
        owners: Sequence[int | None],
        step_timeout: float,
        name: Callable[[int], str],
        record: Callable[[FailureReason], None],
    ) -> None:
        """`directory`: of the run. `owners`: descriptors that become readable when the process ends that started this
        one, or wants the end. `step_timeout`: seconds without an answer after which the driver counts as dead.
        `name`: of a rank, for messages. `record`: called with why the fleet failed.
        """
        self._directory, self._timeout, self._name, self._record = directory, step_timeout, name, record
        self._waker = Waker()
        self._waker.wake_on(signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
        self._owners = [owner for owner in owners if owner is not None]
        self._children: dict[int, int] = {}  # pid -> rank, or DRIVER
        self._ranks: dict[int, socket.socket] = {}  # rank -> channel to it
        self._driver: tuple[int, int] | None = None  # (its standard input, its standard output)
        self._control: ControlClient | None = None  # as soon as the driver listens
        self._unsent: list[m.Message] = []
        self._line = b""  # `Joining`, as much of it as has come
        self._next_ping, self._unanswered = 0.0, 0.0  # times; 0: no question is open
        self._is_heard = False  # the driver has answered
        self._deadline, self._overdue = float("inf"), ""  # when to kill all, and of what that is the consequence
        self._is_ending = False  # more ends need no explanation
        self.exit_code = 0

    # --- start --------------------------------------------------------------------------------------------------------

    def start_driver(self) -> None:
        (child_in, ours_in), (ours_out, child_out) = os.pipe(), os.pipe()
        self._spawn(DRIVER, "hetis.driver.driver", os.environ, child_in, child_out)
        self._driver = (ours_in, ours_out)

    def start_rank(self, rank: int, environment: Mapping[str, str]) -> None:
        """Starts the process of a rank. `environment`: with the variables of torchrun."""
        ours, its = socket.socketpair()
        with its:
            self._spawn(rank, "hetis.launch.member", RANK_DEFAULTS | dict(environment), its.fileno(), 1)
        self._ranks[rank] = ours
        if self._line.endswith(b"\n"):
            ours.sendall(self._line)

    def _spawn(self, child: int, module: str, environment: Mapping[str, str], stdin: int, stdout: int) -> None:
        """Children get no signals of launchers and terminals, which are for the agent and the root."""
        pid = os.posix_spawn(
            sys.executable,
            start.command(module, self._directory, str(os.getpid())),
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)],
            setsigmask=[signal.SIGTERM, signal.SIGINT],
        )
        self._children[pid] = child
        if child == DRIVER:
            os.close(stdin)
            os.close(stdout)

    # --- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Returns when all children have ended, grandchildren included: the exit code of this process."""
        while self._children or not self._is_ending:
            self._wait()
            self._read_signals()
            self._read_owners()
            self._read_joining()
            self._read_driver()
            for pid, status in reap():
                if (child := self._children.pop(pid, None)) is not None:  # else an orphan of a rank
                    self._on_end(child, status)
            if time.monotonic() > self._deadline:
                self._on_deadline()
        end_orphans()
        return self.exit_code

    def _wait(self) -> None:
        """Waits until something has happened or is due."""
        now = time.monotonic()
        due = min(self._deadline, self._next_ping) if self._control is not None else self._deadline
        seconds = None if due == float("inf") else max(0.0, due - now) + 0.001
        descriptors = [self._waker.fileno(), *self._owners]
        if self._control is not None:
            self._control.waiter(*descriptors, until_lost=False)(seconds)
        else:
            select.select([*descriptors, *self._speakers()], [], [], seconds)

    def _read_signals(self) -> None:
        if not self._waker.drain() & {signal.SIGTERM, signal.SIGINT} or self._is_ending:
            return
        self._overdue = self._overdue or f"{', '.join(map(self._name, self._ranks))} {END_REQUESTED}."
        if self._driver is None and not self._is_heard:  # nothing is up yet
            self._fail(self._overdue)
            return
        self._send(m.AskedToEnd())
        self._expect_end(REQUEST_SECONDS)

    def _read_owners(self) -> None:
        if not self._owners or not select.select(self._owners, [], [], 0)[0]:
            return
        self._owners = []
        self._is_ending = True
        if self._driver is not None:
            os.close(self._driver[0])
        self._expect_end(0.0 if self._driver is None else END_SECONDS)

    # --- the driver ---------------------------------------------------------------------------------------------------

    def _speakers(self) -> list[int]:
        """Descriptors on which `Joining` comes: from the driver, or from a rank that has it from torchrun's store."""
        if self._is_ending or self._line.endswith(b"\n"):
            return []
        return [self._driver[1]] if self._driver is not None else [each.fileno() for each in self._ranks.values()]

    def _read_joining(self) -> None:
        for speaker in select.select(self._speakers(), [], [], 0)[0]:
            self._line += os.read(speaker, 1 << 16)
            if self._line.endswith(b"\n"):
                self._connect(msgspec.json.decode(self._line, type=Joining))

    def _connect(self, joining: Joining) -> None:
        from hetis.comm.control import ControlClient  # here: the children start meanwhile

        self._control = ControlClient(joining.endpoints.agents, f"agent-{min(self._ranks, default=0)}", "agents")
        if self._driver is not None:
            for each in self._ranks.values():
                with suppress(OSError):  # it has ended, which is noticed
                    each.sendall(self._line)
        for message in (m.AgentHello(ranks=sorted(self._ranks)), *self._unsent):
            self._control.send(message)

    def _send(self, message: m.Message) -> None:
        if self._control is None:
            self._unsent.append(message)
        else:
            self._control.send(message)

    def _read_driver(self) -> None:
        if self._control is None:
            return
        while (message := self._control.receive(0)) is not None:
            self._is_heard, self._unanswered = True, 0.0
            if isinstance(message, m.End):
                self._on_end_of_fleet(message.reason)
        now = time.monotonic()
        if self._is_ending:
            self._next_ping = float("inf")
        elif self._driver is None and self._control.is_lost:
            self._fail("the driver ended.")
        elif self._unanswered and now - self._unanswered > self._timeout:
            self._fail(f"the driver has not answered for {self._timeout:g} s (stopped, or its host is gone).")
            self._kill_all()
        elif now >= self._next_ping:
            self._control.send(m.Ping())
            self._next_ping, self._unanswered = now + PING_SECONDS, self._unanswered or now

    def _on_end_of_fleet(self, reason: str | None) -> None:
        if reason is not None:
            self._fail(reason)
        else:
            self._is_ending = True
            self._expect_end(RANK_SECONDS)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _on_end(self, child: int, status: int) -> None:
        """A child has ended."""
        if child == DRIVER:
            if status != 0 and not self._is_ending:  # if it has recorded a reason, that one stays
                self._fail(f"the driver {describe_end(status)}.")
            self._is_ending = True
            self._expect_end(RANK_SECONDS)
            return
        self._ranks.pop(child).close()
        if self._is_ending:
            return
        self._send(m.RankEnded(rank=child, status=status))
        self._overdue = self._overdue or f"{self._name(child)} {describe_end(status)}."
        self._expect_end(FAIL_SECONDS if self._driver is not None or self._is_heard else 0.0)

    def _on_deadline(self) -> None:
        if self._overdue and not self._is_ending:
            self._fail(self._overdue)
        self._kill_all()

    def _fail(self, reason: str) -> None:
        """Records why the fleet failed, and ends it. A driver that runs has a moment to end."""
        self._record(FailureReason(reason))
        self._is_ending, self.exit_code = True, 1
        supervision.kill(pid for pid, child in self._children.items() if child != DRIVER)
        self._expect_end(RANK_SECONDS)

    def _expect_end(self, seconds: float) -> None:
        """All children are killed after so many seconds, if they still run."""
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _kill_all(self) -> None:
        self._is_ending, self._deadline = True, float("inf")
        supervision.kill(self._children)


def reap() -> Iterator[tuple[int, int]]:
    """(pid, wait status) of every child that has ended."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            yield ended


def end_orphans() -> None:
    """Kills what ranks have left: their children are children of this process now."""
    with suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
        import psutil

        supervision.kill(process.pid for process in psutil.Process().children(recursive=True))
        while True:
            os.waitpid(-1, 0)


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    """Variables as torchrun sets them, for one of `world_size` ranks of this host."""
    values = (rank, rank, world_size, world_size, 0, 1)
    return dict(os.environ) | dict(zip(torchrun.RANK_VARIABLES, map(str, values), strict=True))


# --- the two kinds ----------------------------------------------------------------------------------------------------


def begin(parent: int) -> int | None:
    """First call; a descriptor that becomes readable when the parent ends. This process outlives it by a moment."""
    start.begin()
    supervision.adopt_orphans()
    supervision.run_on_without_parent()
    return supervision.open_pidfd(parent)


def main() -> NoReturn:
    directory, root = sys.argv[1], int(sys.argv[2])
    parent = begin(root)
    args = msgspec.json.decode((Path(directory) / JOB).read_bytes(), type=DriverArgs)
    # a process that the root forked may hold its end of the pipe, so its own end is watched as well
    owners = (sys.stdin.fileno(), parent)
    agent = Agent(
        directory,
        owners,
        args.config.step_timeout,
        lambda rank: member_name(args.plan, rank),
        FailureRecord(directory).write,
    )
    agent.start_driver()
    if torchrun.under_torchrun():
        agent.start_rank(0, os.environ)
    else:
        for rank in args.plan.ranks:
            agent.start_rank(rank, rank_environment(rank, args.plan.world_size))
    code = agent.run()
    if supervision.has_ended(root):
        shutil.rmtree(directory, ignore_errors=True)  # else the root reads the failure reason
    os._exit(code)


def run_under_torchrun(step_timeout: float) -> NoReturn:
    """Runs this process, which torchrun started, as the agent of its rank, to the end of the fleet."""
    rank = int(os.environ["RANK"])
    parent = begin(os.getppid())
    prints = os.environ["GROUP_RANK"] != "0" and os.environ["LOCAL_RANK"] == "0"  # the root prints on its own host

    def record(reason: FailureReason) -> None:
        report_to_torchrun(reason.text)
        if prints:
            show(reason.text)

    agent = Agent("", [parent], step_timeout, lambda rank: f"rank {rank}", record)
    agent.start_rank(rank, os.environ)
    os._exit(agent.run())


if __name__ == "__main__":
    main()
