"""A fleet as its root sees it: started, watched and ended as one agent."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from hetis.core.config import JOB, DriverArgs, EngineConfig
from hetis.core.logs import environment_of_children
from hetis.launch import torchrun
from hetis.launch.capacity import check_processes
from hetis.launch.checks import end_of_sequence_ids, plan_for
from hetis.launch.run_directory import make_run_directory
from hetis.models.weight_files import with_own_head
from hetis.processes import start
from hetis.processes.failure import FailureReason, FailureRecord, describe_end
from hetis.processes.supervision import open_pidfd

CLOSE_SECONDS = 4.0  # that the agent has to end: more than it gives to its children


class Fleet:
    """All processes of one fleet, which end when `end` is called or this process ends. For any thread."""

    def __init__(self, directory: Path, agent: "subprocess.Popen[bytes]") -> None:
        """Takes ownership of the run directory, in which front ends find the socket `front`."""
        self.directory, self._agent = directory, agent
        self._end_of_agent = open_pidfd(agent.pid)
        if self._end_of_agent is not None:
            weakref.finalize(self, os.close, self._end_of_agent)
        self._reason: FailureReason | None = None

    def fileno(self) -> int | None:
        """A descriptor that is readable when the agent has ended; None where the system has none: poll `has_ended`."""
        return self._end_of_agent

    def has_ended(self) -> bool:
        return self._agent.poll() is not None

    def reason(self) -> FailureReason | None:
        """Why the fleet failed: how the agent was killed, else the recorded reason; None if there is none."""
        if self._reason is None:
            code = self._agent.poll()
            if code is not None and code < 0:  # and all others with it
                self._reason = FailureReason(f"the agent, which had started the ranks, {describe_end(-code)}.")
            else:
                self._reason = FailureRecord(self.directory).read()
        return self._reason

    def request_end(self) -> None:
        """Passes a launcher's request to end to the driver, which has the root end the fleet if nothing has failed."""
        self._agent.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Ends all processes, which have `CLOSE_SECONDS` to end in order, and removes the run directory."""
        assert self._agent.stdin is not None
        with suppress(OSError, ValueError):  # it has ended; it is closed
            os.write(self._agent.stdin.fileno(), b"\n")  # a forked child may keep the pipe open
            self._agent.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._agent.wait(CLOSE_SECONDS)
        self.reason()
        if self._agent.returncode is None or self._agent.returncode < 0:  # else all that it started has ended
            with suppress(ProcessLookupError):
                os.killpg(self._agent.pid, signal.SIGKILL)  # its session holds nothing else
            self._agent.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def start_fleet(config: EngineConfig, *, measure: bool = False) -> Fleet:
    """Starts a fleet on this host or, as torchrun's root, the driver and rank 0 of its fleet.

    Returns without waiting for it. `measure`: every device and link is measured anew. Raises ValueError for what can be
    refused before a process starts.
    """
    model, spec, plan = plan_for(config)
    if torchrun.is_root:
        torchrun.check_world_size(plan)
    elif not config.oversubscribe:
        check_processes(plan)
    with ExitStack() as started:
        directory = make_run_directory()
        started.callback(shutil.rmtree, directory, ignore_errors=True)
        args = DriverArgs(
            config=config,
            measure=measure,
            spec=spec if config.load_format == "dummy" else with_own_head(spec, model),
            plan=plan,
            eos_token_ids=end_of_sequence_ids(config, model, spec.vocab_size),
            run_directory=str(directory),
            address=torchrun.own_address() if torchrun.is_root and torchrun.has_many_hosts() else None,
        )
        (directory / JOB).write_bytes(msgspec.json.encode(args))
        fleet = Fleet(directory, _start_agent(directory))
        started.pop_all()
    if torchrun.is_root and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: fleet.request_end())
    return fleet


def _start_agent(directory: Path) -> "subprocess.Popen[bytes]":
    start.leave_deleted_directory()
    environment = start.environment() | environment_of_children()
    return subprocess.Popen(
        start.command("hetis.launch.agent", str(directory), str(os.getpid())),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if sys.__stderr__ is None else 2,  # standard output is the root's
        env=environment if torchrun.is_root else torchrun.without_torchrun(environment),
        start_new_session=True,  # signals of terminals and launchers are for the root
    )
