"""Life and death of processes on one host: die with the parent, notice a death at once, say how a process ended."""

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(with_signal: int = signal.SIGKILL) -> None:
    """Ask the kernel for `with_signal` when the parent ends, so that nothing is orphaned whatever kills it (Linux)."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(with_signal))
    except (OSError, AttributeError):
        return  # not Linux: the heartbeat still ends us
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), with_signal)


def host_id() -> str:
    """Equal for two processes iff they can see each other's pids and share memory: boot id and pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when `pid` ends; None where the system has none."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def end_of(pid: int) -> str:
    """How a process of this host ended, as far as can be seen before its parent reaps it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        state, status = fields[0], int(fields[49])
    except (OSError, ValueError, IndexError):
        return "ended without a word (killed, out of memory or crashed)"
    if state != "Z":
        return "stopped answering"
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"exited with code {os.WEXITSTATUS(status)}"


def kill(pids: list[int]) -> None:
    """SIGKILL each pid that still exists; it ends stopped processes too."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
