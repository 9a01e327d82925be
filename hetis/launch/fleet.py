"""A fleet as the process that started it sees it: how it is started, when and why it has ended, and how it is ended."""

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

from hetis.comm.control import OWNER, FrontClient
from hetis.core.config import EngineConfig
from hetis.core.messages import Shutdown
from hetis.launch import torchrun
from hetis.launch.capacity import check_processes
from hetis.launch.checks import plan_for
from hetis.launch.local_launcher import end_launcher, start_launcher
from hetis.launch.run_directory import make_run_directory
from hetis.processes.failure import FailureReason, FailureRecord, describe_end
from hetis.processes.supervision import open_pidfd


class Fleet:
    """A running fleet. `directory`: its run directory, with the control socket `front`."""

    def __init__(self, directory: Path, launcher: "subprocess.Popen[bytes] | None") -> None:
        """`launcher`: the process that started the ranks; None under torchrun, where rank 0 owns `directory`."""
        self.directory, self._launcher = directory, launcher
        self._end_fd = open_pidfd(os.getppid() if launcher is None else launcher.pid)
        self._control = None if launcher is None else FrontClient(directory, OWNER)
        self._is_ending = False

    def fileno(self) -> int | None:
        """A descriptor that is readable when the fleet has ended; None: ask `has_ended`."""
        return self._end_fd

    def has_ended(self) -> bool:
        return self._launcher is not None and self._launcher.poll() is not None

    def reason(self) -> FailureReason | None:
        """Why the fleet has ended: the end of the launcher, if it was killed, else what was recorded, if anything."""
        code = self._launcher.poll() if self._launcher is not None else None
        if code is not None and code < 0:  # which has killed the ranks
            return FailureReason(f"the launcher of the ranks {describe_end(-code)}.")
        return FailureRecord(self.directory).read()

    def end(self) -> None:
        """Ends all processes of the fleet in order, a few seconds at most; may be called again."""
        if self._launcher is None or self._control is None or self._is_ending:
            return
        self._is_ending = True
        self._control.send(FrontClient.encode(Shutdown()))
        end_launcher(self._launcher)
        self._control.close(linger=0)
        shutil.rmtree(self.directory, ignore_errors=True)

    def __del__(self) -> None:
        if self._end_fd is not None:
            os.close(self._end_fd)


def start_fleet(config: EngineConfig, *, measure: bool = False) -> Fleet:
    """Starts the processes of a fleet, of which nothing stays if not all can start; under torchrun it runs already.

    `measure`: every device and link is measured anew. Raises ValueError for what can be refused at once.
    """
    plan = plan_for(config)[2]
    if torchrun.fleet_directory is not None:
        return Fleet(torchrun.fleet_directory, None)
    if not config.oversubscribe:
        check_processes(plan)
    with ExitStack() as started:
        directory = make_run_directory()
        started.callback(shutil.rmtree, directory, ignore_errors=True)
        launcher = start_launcher(config, plan, directory, measure=measure)
        started.callback(end_launcher, launcher)
        fleet = Fleet(directory, launcher)
        started.pop_all()
    return fleet
