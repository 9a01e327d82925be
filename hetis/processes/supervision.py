"""Life and death of processes on one host: die with the parent, notice an end at once, say how and why it came."""

import ctypes
import json
import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_VERDICT = "verdict"
END, TOLD = b"end\n", b"told\n"  # rank 0's last line to the driver: shut down in order; my launcher ends me
_BY_REQUEST = frozenset({signal.SIGTERM, signal.SIGINT})


# --- families ---------------------------------------------------------------------------------------------------------


@contextmanager
def hold(*signals: signal.Signals) -> Iterator[None]:
    """Signals wait until the end of the block; children started in it never see them. Main thread only."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends, so that nothing is orphaned whatever kills it (Linux).

    `parent`: the pid of the process that started this one, which cannot tell if that ended before.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def run_on_without_parent() -> None:
    """Ask the kernel for SIGCONT when the parent ends: this process sees to its own end, even if it was stopped."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, which can then end or outlast them (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    """Nothing where the system has no such call: heartbeats and closed connections still end all processes, later."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value)


def host_id() -> str:
    """Equal for two processes iff they can see each other's pids and share memory: boot id and pid namespace."""
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
    """How a process of this host ended, as `os.wait` gives it; None when it runs, or when its parent knows already."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[49]) if fields[0] in "ZX" else None
    except (OSError, ValueError, IndexError):
        return None


def has_ended(pid: int) -> bool:
    """Whether no process of this host has this number, or one that waits to be reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return wait_status(pid) is not None


def await_status(pid: int, seconds: float) -> int | None:
    """`wait_status` of a process that is about to end, or has: the kernel closes its files before it notes how."""
    deadline = time.monotonic() + seconds
    while (status := wait_status(pid)) is None and Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    return status


def signal_name(number: int) -> str:
    """As in "SIGKILL"; of real-time signals Python names only the first and the last."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe_end(status: int | None) -> str:
    """A wait status as the rest of a sentence that begins with the name of a process."""
    if status is None:
        return "ended without giving a reason (killed, out of memory or crashed)"
    if os.WIFSIGNALED(status):
        name = signal_name(os.WTERMSIG(status))
        return f"was killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"exited with code {os.WEXITSTATUS(status)}"


def ended_by_request(status: int | None) -> bool:
    """Whether the end was asked for (Ctrl-C, a launcher that ends all because one failed): it is no cause."""
    return status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) in _BY_REQUEST


def end_of(pid: int) -> str:
    """How a process of this host ended, in words, as far as can be seen before its parent reaps it."""
    return describe_end(wait_status(pid))


def kill(pids: Iterable[int]) -> None:
    """SIGKILL each pid that still exists; it ends stopped processes too."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


class Waker:
    """Wakes a thread that polls `fileno()`: from any thread by `wake`, and by signals, whatever the main thread does.

    Python runs signal handlers only between two instructions of the main thread, which may sit in C++ for long; the
    byte in this pipe comes at once. Its descriptors are closed when the last reference is gone, so `wake` is always
    harmless.
    """

    def __init__(self) -> None:
        self._out, self._in = socket.socketpair()
        self._out.setblocking(False)
        self._in.setblocking(False)

    def fileno(self) -> int:
        return self._out.fileno()

    def wake(self) -> None:
        with suppress(BlockingIOError):  # full: the thread has not seen earlier calls yet
            self._in.send(b"\0")

    def __del__(self) -> None:
        self._out.close()
        self._in.close()

    def wake_on(self, *signals: signal.Signals) -> None:
        """From now on these signals do nothing but wake, as long as the process lives. Main thread only."""
        for each in signals:
            signal.signal(each, lambda *_: None)
        signal.set_wakeup_fd(self._in.fileno(), warn_on_full_buffer=False)

    def drain(self) -> set[int]:
        """What has woken since the last call: numbers of signals, 0 for `wake`."""
        try:
            return set(self._out.recv(4096))
        except BlockingIOError:
            return set()


# --- verdicts ---------------------------------------------------------------------------------------------------------


class Verdict(msgspec.Struct, frozen=True):
    """Why a fleet ended. `refused`: the user asked for something that cannot be; nothing broke."""

    reason: str
    refused: bool = False


def leave_verdict(directory: Path | str, verdict: Verdict) -> bool:
    """Leaves the verdict in a run's directory; False if there is one already: the first one stays."""
    draft = Path(directory) / f"{_VERDICT}.{os.getpid()}"
    try:
        draft.write_bytes(msgspec.json.encode(verdict))
        os.link(draft, Path(directory) / _VERDICT)  # never half written, never written twice
    except FileExistsError:
        return False
    except FileNotFoundError:  # the front end ended, and the directory with it
        return True
    finally:
        draft.unlink(missing_ok=True)
    return True


def read_verdict(directory: Path | str) -> Verdict | None:
    try:
        return msgspec.json.decode((Path(directory) / _VERDICT).read_bytes(), type=Verdict)
    except FileNotFoundError:
        return None


def report_to_torchrun(reason: str) -> None:
    """Has torchrun's summary of failed processes show `reason` for this one; the first reason stays."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    told = {"message": {"message": reason, "extraInfo": {"py_callstack": reason, "timestamp": str(int(time.time()))}}}
    with suppress(OSError), open(path, "x") as file:
        json.dump(told, file)
