"""Lifetimes of processes on one host: ties to the parent, noticing an end at once, and its wait status."""

import ctypes
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


# --- parents and children ---------------------------------------------------------------------------------------------


def die_with_parent(parent: int) -> None:
    """Asks the kernel for SIGKILL when the parent ends, so that nothing is orphaned whatever kills it (Linux).

    `parent`: its pid as the parent knows it; this process could not tell if the parent had ended before.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def run_on_without_parent() -> None:
    """Asks the kernel for SIGCONT when the parent ends, so that this process ends itself, even if it was stopped."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def adopt_orphans() -> None:
    """Makes descendants whose parent ends children of this process, which can then end or outlast them (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    """Does nothing where the call is missing or forbidden: heartbeats and lost connections end all processes, later."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value)


def host_id() -> str:
    """Boot id and pid namespace: equal for two processes that see each other's pids and share memory.

    Virtual machines that were restored from one snapshot have equal ones, too: see `comm.hosts`.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename


# --- ends -------------------------------------------------------------------------------------------------------------


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when `pid` ends; None where the system has none, or no such process."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def wait_status(pid: int) -> int | None:
    """How a process of this host ended, as `os.wait` gives it; None while it runs and once it has been reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[49]) if fields[0] in "ZX" else None
    except (OSError, ValueError, IndexError):
        return None


def has_ended(pid: int) -> bool:
    """Whether no process of this host has this number, or only one that waits to be reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return wait_status(pid) is not None


def kill(pids: Iterable[int]) -> None:
    """Sends SIGKILL to each pid that still exists; stopped processes end as well."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
