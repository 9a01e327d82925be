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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from hetis.core import messages as m
from hetis.core.config import JOB, DriverArgs, Joining
from hetis.launch import torchrun
from hetis.launch.children import DRIVER, Children, rank_environment
from hetis.launch.driver_link import DriverLink
from hetis.processes import failure, start, supervision
from hetis.processes.failure import FailureReason
from hetis.processes.waker import Waker

END_SECONDS = 2.5  # that all children have to end in order
RANK_SECONDS = 1.5  # that they have of these after the driver, or after it has said that the fleet ends


class Agent:
    """Ends after the last of its children."""

    def __init__(
        self,
        directory: str,
        owners: Sequence[int | None],
        step_timeout: float,
        name: Callable[[int], str],
        record: Callable[[FailureReason], None],
    ) -> None:
        """`directory`: of the run. `owners`: descriptors that become readable when the process that started this one
        has ended, or wants the end. `name`: of a rank, for messages. `record`: called with why the fleet failed.
        """
        self.children, self._name, self._record = Children(directory), name, record
        self._owners = [owner for owner in owners if owner is not None]
        self._waker = Waker()
        self._waker.wake_on(signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
        self._driver = DriverLink(step_timeout)
        self._joining = b""  # a line of JSON, as much of it as has come
        self._deadline = float("inf")  # when to kill all children
        self._is_ending = False  # further ends need no explanation
        self._exit_code = 0

    def start_rank(self, rank: int, environment: Mapping[str, str]) -> None:
        """At any time, also again after its end. `environment`: with the variables of torchrun."""
        self.children.start_rank(rank, environment)
        if self._driver.is_connected:
            self._greet(rank)

    def run(self) -> int:
        """Returns when all children have ended, and what they have left: the exit code of this process."""
        while self.children or not self._is_ending:
            descriptors = [self._waker.fileno(), *self._owners, *self._speakers()]
            self._driver.wait(descriptors, max(0.0, self._deadline - time.monotonic()))
            self._read_signals()
            self._read_owners()
            self._read_joining()
            self._follow_driver()
            for child, status in self.children.reap():
                self._on_end(child, status)
            if time.monotonic() > self._deadline:
                self._deadline = float("inf")
                self.children.kill()
        self.children.end_orphans()
        return self._exit_code

    # --- what happens -------------------------------------------------------------------------------------------------

    def _read_signals(self) -> None:
        if self._waker.drain() & {signal.SIGTERM, signal.SIGINT}:
            names = ", ".join(map(self._name, self.children.ranks))
            self._tell(m.AskedToEnd(), f"{names} {failure.END_REQUESTED}.")

    def _read_owners(self) -> None:
        if not self._owners or not select.select(self._owners, [], [], 0)[0]:
            return
        self._owners, self._is_ending = [], True
        if self.children.driver_input is None:
            self._expect_end(0.0)
        else:
            os.close(self.children.driver_input)
            self._expect_end(END_SECONDS)

    def _speakers(self) -> list[int]:
        """Descriptors on which `Joining` comes: from the driver, or from a rank that has it from torchrun's store."""
        if self._is_ending or self._joining.endswith(b"\n"):
            return []
        driver = self.children.driver_output
        return [each.fileno() for each in self.children.ranks.values()] if driver is None else [driver]

    def _read_joining(self) -> None:
        for speaker in select.select(self._speakers(), [], [], 0)[0]:
            self._joining += os.read(speaker, 1 << 16)
        if self._joining.endswith(b"\n") and not self._driver.is_connected:
            endpoints = msgspec.json.decode(self._joining, type=Joining).endpoints
            self._driver.connect(endpoints.agents, sorted(self.children.ranks))
            if self.children.driver_output is not None:
                for rank in self.children.ranks:
                    self._greet(rank)

    def _greet(self, rank: int) -> None:
        """Tells a rank where the driver listens."""
        with suppress(OSError):  # it has ended, which is noticed
            self.children.ranks[rank].sendall(self._joining)

    def _follow_driver(self) -> None:
        for end in self._driver.ends():
            if end.reason is not None:
                self._fail(end.reason)
            else:
                self._is_ending = True
                self._expect_end(RANK_SECONDS)
        if self._is_ending:
            return
        problem = self._driver.problem(is_child=self.children.driver_input is not None)
        if problem is not None:
            self._fail(f"the driver {problem}.")
            self.children.kill()

    def _on_end(self, child: int, status: int) -> None:
        """A child has ended."""
        if child == DRIVER:
            if status != 0 and not self._is_ending:  # if it has recorded a reason, that one stays
                self._fail(f"the driver {failure.describe_end(status)}.")
            self._is_ending = True
            self._expect_end(RANK_SECONDS)
        else:
            text = f"{self._name(child)} {failure.describe_end(status)}."
            self._tell(m.RankEnded(rank=child, status=status), text)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _tell(self, message: m.Message, reason: str) -> None:
        """Sends a message to the driver, which finds the cause. `reason`: if there is no fleet yet, to this process."""
        if self._is_ending:
            return
        if self.children.driver_input is not None or self._driver.is_heard:
            self._driver.send(message)
        else:
            self._fail(reason)

    def _expect_end(self, seconds: float) -> None:
        """All children are killed after so many seconds, if they still run."""
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _fail(self, reason: str) -> None:
        """Records why the fleet failed, and kills its ranks. The driver has a moment to end."""
        self._record(FailureReason(reason))
        self._is_ending, self._exit_code = True, 1
        self.children.kill_ranks()
        self._expect_end(RANK_SECONDS)


# --- the two kinds ----------------------------------------------------------------------------------------------------


def begin(parent: int) -> int | None:
    """First call; a descriptor that becomes readable when the parent ends. This process outlives it by a moment."""
    start.begin()
    supervision.adopt_orphans()
    supervision.run_on_without_parent()
    return supervision.open_pidfd(parent)


def main() -> NoReturn:
    directory, root = sys.argv[1], int(sys.argv[2])
    # a process that the root forked may hold its end of the pipe, so its own end is watched as well
    owners = (sys.stdin.fileno(), begin(root))
    args = msgspec.json.decode((Path(directory) / JOB).read_bytes(), type=DriverArgs)
    record = failure.FailureRecord(directory)
    timeout = args.config.step_timeout
    agent = Agent(directory, owners, timeout, lambda rank: failure.member_name(args.plan, rank), record.write)
    agent.children.start_driver()
    if torchrun.under_torchrun():
        agent.start_rank(0, os.environ)
    else:
        for rank in args.plan.ranks:
            agent.start_rank(rank, rank_environment(rank, args.plan.world_size))
    code = agent.run()
    if record.read() is None or supervision.has_ended(root):  # else the root reads the reason, and removes it
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(code)


def run_under_torchrun(step_timeout: float) -> NoReturn:
    """Runs this process, which torchrun started, as the agent of its rank, to the end of the fleet."""
    owners = [begin(os.getppid())]
    prints = os.environ["GROUP_RANK"] != "0" and os.environ["LOCAL_RANK"] == "0"  # the root prints on its own host

    def record(reason: FailureReason) -> None:
        failure.report_to_torchrun(reason.text)
        if prints:
            failure.show(reason.text)

    agent = Agent("", owners, step_timeout, lambda rank: f"rank {rank}", record)
    agent.start_rank(int(os.environ["RANK"]), os.environ)
    os._exit(agent.run())


if __name__ == "__main__":
    main()
