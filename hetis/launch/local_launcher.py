"""Starts all ranks on this host, without torchrun: `python -m hetis.launch.local_launcher DIRECTORY PARENT [rank]`.

The launcher is a process between the front end and the ranks, so that the ranks end when the front end does, however it
ends, and so that the front end's threads and signals stay its own. It imports no torch, which would take a second of
every start, needs no port (ranks meet in a file), and ends when all that it started has ended, grandchildren included.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from hetis.core.config import EngineConfig
from hetis.core.logs import environment_of_children
from hetis.core.plan import Plan
from hetis.launch import torchrun
from hetis.launch.member import run_member
from hetis.processes import start, supervision
from hetis.processes.failure import FailureReason, FailureRecord, describe_end, member_name
from hetis.processes.waker import Waker

END_SECONDS = 2.0  # that ranks have to end after the front end
ORPHAN_SECONDS = 1.0  # that the driver has to end after the ranks
CLOSE_SECONDS = 4.0  # that the launcher has to end: more than both
FAIL_SECONDS = 5.0  # that the driver has to explain the bad end of a rank, and to end the others
_MODULE = "hetis.launch.local_launcher"
_JOB = "job.json"


class Job(msgspec.Struct, frozen=True):
    """The launcher's input, a file that the front end leaves in the run directory."""

    config: EngineConfig
    plan: Plan
    measure: bool


# --- the front end's side ---------------------------------------------------------------------------------------------


def start_launcher(
    config: EngineConfig, plan: Plan, run_directory: Path, *, measure: bool
) -> "subprocess.Popen[bytes]":
    """Starts the launcher, and with it the ranks. They end when its standard input is closed.

    `measure`: every device and link is measured anew.
    """
    start.leave_deleted_directory()
    (run_directory / _JOB).write_bytes(msgspec.json.encode(Job(config, plan, measure)))
    return subprocess.Popen(
        start.command(_MODULE, str(run_directory), str(os.getpid())),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if sys.__stderr__ is None else 2,  # standard output is the front end's
        env=torchrun.without_torchrun(start.environment()) | environment_of_children(),
        start_new_session=True,  # Ctrl-C is for the front end, which then shuts down in order
    )


def end_launcher(launcher: "subprocess.Popen[bytes]") -> None:
    """Ends all processes of the fleet, which have `CLOSE_SECONDS` to end in order."""
    assert launcher.stdin is not None
    launcher.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        launcher.wait(CLOSE_SECONDS)
    if launcher.returncode is None or launcher.returncode < 0:  # else all that it started has ended
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)  # its session holds nothing else
        launcher.wait()


# --- the launcher -----------------------------------------------------------------------------------------------------


class Launcher:
    """Starts the ranks of a job, and ends after all of them."""

    def __init__(self, job: Job, directory: Path, front: int) -> None:
        """`front`: pid of the front end."""
        self._plan, self._directory = job.plan, directory
        self._waker = Waker()
        self._waker.wake_on(signal.SIGCHLD)
        self._poll = select.poll()
        self._poll.register(self._waker.fileno(), select.POLLIN)
        # a process that the front end forked may hold its end of the pipe, so its own end is watched as well
        self._front_fds = [sys.stdin.fileno(), supervision.open_pidfd(front)]
        for fd in self._front_fds:
            if fd is not None:
                self._poll.register(fd, select.POLLIN)
        self._deadline: float | None = None
        self._front_ended = False
        self._bad_end: FailureReason | None = None  # of a rank, the first one
        members = job.plan.members
        self._ranks = {start_rank(member.rank, len(members), directory): member.rank for member in members}

    def run(self) -> int:
        """Returns when all that was started has ended: the exit code of the job."""
        while self._ranks:
            self._wait(None if self._deadline is None else max(0.01, self._deadline - time.monotonic()))
            for pid in [pid for pid in self._ranks if has_ended(pid)]:
                self._on_end(pid)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._record()  # before the driver records that this process killed ranks
                supervision.kill(self._ranks)
        self._end_orphans()
        if self._front_ended:
            shutil.rmtree(self._directory, ignore_errors=True)  # else the front end reads the failure reason
        return int(self._bad_end is not None)

    def _wait(self, seconds: float | None) -> None:
        """Waits for a child or the front end to end; None: without limit."""
        for fd, _ in self._poll.poll(None if seconds is None else 1000 * seconds):
            if fd in self._front_fds:
                self._poll.unregister(fd)
                self._front_ended = True
                self._expect_end(END_SECONDS)
        self._waker.drain()

    def _expect_end(self, seconds: float) -> None:
        self._deadline = min(self._deadline or float("inf"), time.monotonic() + seconds)

    def _on_end(self, pid: int) -> None:
        """Notes the end of a rank."""
        rank, status = self._ranks.pop(pid), supervision.wait_status(pid)
        if status == 0:
            return
        if self._bad_end is None:
            self._bad_end = FailureReason(f"{member_name(self._plan, rank)} {describe_end(status)}.")
        self._expect_end(FAIL_SECONDS)

    def _end_orphans(self) -> None:
        """Waits for the driver, which outlives the ranks, and for other processes that they left; then kills them."""
        begin = time.monotonic()
        while not reap():
            if time.monotonic() > begin + (ORPHAN_SECONDS if self._front_ended else FAIL_SECONDS):
                supervision.kill(descendants())
            self._wait(0.05)
        self._record()

    def _record(self) -> None:
        """Records the bad end of a rank, unless the driver has explained it."""
        if self._bad_end is not None:
            FailureRecord(self._directory).write(self._bad_end)


def start_rank(rank: int, world_size: int, directory: Path) -> int:
    """Starts a rank; its pid."""
    values = (rank, rank, world_size, world_size, 0, 1)
    environment = os.environ | dict(zip(torchrun.RANK_VARIABLES, map(str, values), strict=True))
    return os.posix_spawn(
        sys.executable,
        start.command(_MODULE, str(directory), str(os.getpid()), "rank"),
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
    )


def has_ended(pid: int) -> bool:
    """Whether a child has ended. It is not reaped: the driver reads its wait status."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reap() -> bool:
    """Reaps all children that have ended; True when none is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass
    except ChildProcessError:
        return True
    return False


def descendants() -> list[int]:
    import psutil

    return [process.pid for process in psutil.Process().children(recursive=True)]


def main() -> NoReturn:
    directory, parent = Path(sys.argv[1]), int(sys.argv[2])
    job = msgspec.json.decode((directory / _JOB).read_bytes(), type=Job)
    if sys.argv[3:] == ["rank"]:
        run_member(job.config, measure=job.measure, run_directory=directory, parent=parent)
    start.begin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    supervision.adopt_orphans()
    supervision.run_on_without_parent()
    os._exit(Launcher(job, directory, parent).run())


if __name__ == "__main__":
    main()
