"""Why a job failed: how the end of a process is worded, and where the failure reason is kept and shown.

The first process that knows the reason records it in the run directory; reasons found later are consequences of the
first, and are dropped. These processes record one:

    driver    the best explanation of what agents and ranks reported (`driver.watch`)
    agent     the end of the driver, or its silence (`launch.agent`)

The root reads the record, and shows the reason to the user. torchrun's own summary of failed processes has it from
each process that torchrun started (`report_to_torchrun`).
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from hetis.core.plan import Plan
from hetis.processes.supervision import wait_status

END_REQUESTED = "was asked to end by its launcher"
_FILE = "failure"


class FailureReason(msgspec.Struct, frozen=True):
    """One sentence for the user. `refused`: what the user asked for is impossible; nothing broke."""

    text: str
    refused: bool = False


class FailureRecord:
    """The failure reason of one job, a file in its run directory."""

    def __init__(self, run_directory: Path | str) -> None:
        self._path = Path(run_directory) / _FILE

    def write(self, reason: FailureReason) -> None:
        """Records the reason, unless there is one: the first one stays."""
        draft = self._path.with_name(f"{_FILE}.{os.getpid()}")
        with suppress(FileExistsError, FileNotFoundError):  # there is one; the root has removed the directory
            draft.write_bytes(msgspec.json.encode(reason))
            os.link(draft, self._path)  # a reader never sees half of it
        draft.unlink(missing_ok=True)

    def read(self) -> FailureReason | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=FailureReason)
        except FileNotFoundError:
            return None


def show(text: str) -> None:
    """Prints a failure reason to stderr, the last line of a job that fails."""
    print(f"hetis: {text}", file=sys.stderr, flush=True)


def report_to_torchrun(text: str) -> None:
    """Has torchrun's summary of failed processes show `text` for this process; its first report stays."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    report = {"message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}}
    with suppress(OSError), open(path, "x") as file:
        json.dump(report, file)


# --- words ------------------------------------------------------------------------------------------------------------


def member_name(plan: Plan, rank: int, device: str | None = None) -> str:
    """As in "rank 2 (attention worker on cpu)". `device`: the one that the rank took; None: the plan's."""
    return f"rank {rank} ({plan.role_of(rank)} on {device or plan.device_of(rank)})"


def describe_end(status: int | None) -> str:
    """How a process ended, as the rest of a sentence that begins with its name. `status`: as `os.wait` gives it."""
    if status is None:
        return "ended without giving a reason (killed, out of memory or crashed)"
    if os.WIFSIGNALED(status):
        name = signal_name(os.WTERMSIG(status))
        return f"was killed by {name}" + (", perhaps because memory ran out" if name == "SIGKILL" else "")
    return f"exited with code {os.WEXITSTATUS(status)}"


def end_of(pid: int) -> str:
    """How a process of this host ended, in words; best before its parent reaps it."""
    return describe_end(wait_status(pid))


def signal_name(number: int) -> str:
    """As in "SIGKILL"; of real-time signals Python names only the first and the last."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
