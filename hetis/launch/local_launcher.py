"""All ranks of one host without torchrun: `python -m hetis.launch.local_launcher DIRECTORY`.

A process between the front end and the ranks, so that the ranks end when the front end does, however it ends, and so
that the front end's threads and signals are left alone. It imports no torch (a second, on every start), needs no port
(ranks meet in a file), and ends only when nothing that it started is left, grandchildren included.
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
from hetis.processes import children, supervision

END_SECONDS = 2.0  # for the fleet to end by itself when the front end has
ORPHAN_SECONDS = 1.0  # then for the driver, when the ranks have ended
CLOSE_SECONDS = 4.0  # for the launcher: more than both
FAIL_SECONDS = 5.0  # when a rank has ended: the driver explains, and ends the others
_MODULE = "hetis.launch.local_launcher"
_JOB = "job.json"


class Job(msgspec.Struct, frozen=True):
    config: EngineConfig
    plan: Plan


# --- the front end's side ---------------------------------------------------------------------------------------------


def start_launcher(config: EngineConfig, plan: Plan, run_directory: Path) -> "subprocess.Popen[bytes]":
    """Starts the launcher, and with it the ranks. They end when its standard input is closed."""
    children.leave_deleted_directory()
    (run_directory / _JOB).write_bytes(msgspec.json.encode(Job(config, plan)))
    return subprocess.Popen(
        children.command(_MODULE, str(run_directory), str(os.getpid())),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if sys.__stderr__ is None else 2,  # ranks have nothing to say on standard output
        env=torchrun.without_torchrun(children.environment()) | environment_of_children(),
        start_new_session=True,  # Ctrl-C is for the front end, which then shuts down in order
    )


def end_launcher(launcher: "subprocess.Popen[bytes]") -> None:
    """Ends all processes of the fleet, which have some seconds to do so in order."""
    assert launcher.stdin is not None
    launcher.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        launcher.wait(CLOSE_SECONDS)
    if launcher.returncode is None or launcher.returncode < 0:  # else it has ended after all that it started
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)  # a session of its own: nothing else is in this group
        launcher.wait()


# --- the launcher -----------------------------------------------------------------------------------------------------


class Launcher:
    """Starts the ranks of a job, and ends after all of them."""

    def __init__(self, job: Job, directory: Path, front: int) -> None:
        """`front`: pid of the front end."""
        self._plan, self._directory = job.plan, directory
        self._waker = supervision.Waker()
        self._waker.wake_on(signal.SIGCHLD)
        self._poll = select.poll()
        self._poll.register(self._waker.fileno(), select.POLLIN)
        # its end of the pipe may live on in a process that it forked, so its life is watched as well
        self._signs_of_front = [sys.stdin.fileno(), supervision.open_pidfd(front)]
        for fd in self._signs_of_front:
            if fd is not None:
                self._poll.register(fd, select.POLLIN)
        self._deadline: float | None = None
        self._front_ended = False
        self._own_verdict: supervision.Verdict | None = None
        members = job.plan.members
        self._ranks = {start_rank(member.rank, len(members), directory): member.rank for member in members}

    def run(self) -> int:
        """The exit code of the job."""
        while self._ranks:
            self._wait(None if self._deadline is None else max(0.01, self._deadline - time.monotonic()))
            for pid in [pid for pid in self._ranks if has_ended(pid)]:
                self._on_end(pid)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._explain()  # before the driver explains what we do
                supervision.kill(self._ranks)
        self._end_orphans()
        if self._front_ended:
            shutil.rmtree(self._directory, ignore_errors=True)  # else the front end reads the verdict there
        return int(self._own_verdict is not None)

    def _wait(self, seconds: float | None) -> None:
        """For a child or the front end to end; None: without limit."""
        for fd, _ in self._poll.poll(None if seconds is None else 1000 * seconds):
            if fd in self._signs_of_front:
                self._poll.unregister(fd)
                self._front_ended = True
                self._expect_end(END_SECONDS)
        self._waker.drain()

    def _expect_end(self, seconds: float) -> None:
        self._deadline = min(self._deadline or float("inf"), time.monotonic() + seconds)

    def _on_end(self, pid: int) -> None:
        """The first bad end counts."""
        rank, status = self._ranks.pop(pid), supervision.wait_status(pid)
        if status == 0:
            return
        if self._own_verdict is None:
            member = f"rank {rank} ({self._plan.role_of(rank)} on {self._plan.device_of(rank)})"
            self._own_verdict = supervision.Verdict(f"{member} {supervision.describe_end(status)}.")
        self._expect_end(FAIL_SECONDS)

    def _end_orphans(self) -> None:
        """Waits for the driver, which outlives the ranks by a moment, and for whatever else they left."""
        begin = time.monotonic()
        while not reap():
            if time.monotonic() > begin + (ORPHAN_SECONDS if self._front_ended else FAIL_SECONDS):
                supervision.kill(descendants())
            self._wait(0.05)
        self._explain()

    def _explain(self) -> None:
        """What we saw, unless the driver has said more about it."""
        if self._own_verdict is not None:
            supervision.leave_verdict(self._directory, self._own_verdict)


def start_rank(rank: int, world_size: int, directory: Path) -> int:
    """The pid of a new rank."""
    values = (rank, rank, world_size, world_size, 0, 1)
    environment = os.environ | dict(zip(torchrun.RANK_VARIABLES, map(str, values), strict=True))
    return os.posix_spawn(
        sys.executable,
        children.command(_MODULE, str(directory), str(os.getpid()), "rank"),
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
    )


def has_ended(pid: int) -> bool:
    """Looks without reaping: the driver wants to read how it ended."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reap() -> bool:
    """Takes note of all ended children; True when none is left."""
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
        run_member(job.config, None, directory, parent)
    children.begin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    supervision.adopt_orphans()
    supervision.run_on_without_parent()
    os._exit(Launcher(job, directory, parent).run())


if __name__ == "__main__":
    main()
