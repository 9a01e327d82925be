"""Memory shared by processes of one host, with counters that processes wait on.

The memory is a memfd, which has no name: the peer opens `/proc/<pid>/fd/<descriptor>` of its creator, and the kernel
frees it with the last process that maps it, however that process ends. Nothing is left behind.
"""

import ctypes
import errno
import functools
import mmap
import os
import platform
import select
from collections.abc import Callable
from typing import cast

import msgspec
import torch

from hetis.processes import failure, supervision
from hetis.processes.limits import usable_cores

WORD_BYTES = 128  # a counter has its cache line to itself, and the line that processors prefetch with it
PAGE_BYTES = 4096
CHECK_INTERVAL_MS = 100  # longest sleep before the peer's state and Python's signals are checked


class Address(msgspec.Struct, frozen=True):
    """Location of a segment, for other processes of this host."""

    pid: int
    descriptor: int
    num_bytes: int


class Segment:
    """Shared memory, initially zero. Its user lays it out: counters at the beginning (`word`), then data."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Maps `descriptor` and takes ownership of it."""
        self._descriptor = descriptor
        self.num_bytes = num_bytes
        self.memory_B = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)

    @classmethod
    def create(cls, num_bytes: int) -> "Segment":
        descriptor = os.memfd_create("hetis", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, num_bytes)
        return cls(descriptor, num_bytes)

    @classmethod
    def attach(cls, address: Address) -> "Segment":
        """Maps the segment at `address`. ConnectionError if its creator has ended; ValueError without permission."""
        try:
            descriptor = os.open(f"/proc/{address.pid}/fd/{address.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            raise ValueError(
                f"process {address.pid} does not let this one share its memory: run both ranks as the same user."
            ) from None
        except OSError as error:
            raise ConnectionError(f"process {address.pid} ended before its memory was shared ({error}).") from None
        return cls(descriptor, address.num_bytes)

    @property
    def address(self) -> Address:
        return Address(os.getpid(), self._descriptor, self.num_bytes)

    def word(self, index: int) -> int:
        """Address of counter `index` in this process; valid while the segment exists."""
        return int(self.memory_B.data_ptr()) + index * WORD_BYTES

    def close(self) -> None:
        """Closes the descriptor. The memory is unmapped with the last tensor that views it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Peer:
    """Process of this host on whose counters this process waits."""

    def __init__(self, rank: int, pid: int) -> None:
        self.rank, self.pid = rank, pid
        self._pidfd = supervision.open_pidfd(pid)
        self._poll = select.poll()
        if self._pidfd is not None:
            self._poll.register(self._pidfd, select.POLLIN)

    def is_alive(self) -> bool:
        return not (supervision.has_ended(self.pid) if self._pidfd is None else self._poll.poll(0))

    def check(self) -> None:
        """Raises ConnectionError, naming rank, pid and cause, if the process has ended."""
        if not self.is_alive():
            raise ConnectionError(f"rank {self.rank} (pid {self.pid}) {failure.end_of(self.pid)}.")

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


class Waiter:
    """Waits for counters to change: spins for `spin_us`, then sleeps."""

    def __init__(self, spin_us: int) -> None:
        self._spin_ns = 1000 * spin_us
        self._wait, self.publish = operations()

    def wait(self, word: int, known: int, check: Callable[[], None]) -> None:
        """Returns once the counter differs from `known`. `check` raises once no process will change it any more."""
        while not self._wait(word, known, self._spin_ns, CHECK_INTERVAL_MS):
            try:
                check()
            except ConnectionError:
                if self._wait(word, known, 0, 0):  # changed before the peer ended
                    return
                raise

    def differs(self, word: int, known: int) -> bool:
        """Whether the counter differs from `known`, without waiting."""
        return self._wait(word, known, 0, 0)


def default_spin_us() -> int:
    """Microseconds to spin: 0 if ranks outnumber usable cores, where spinning takes a core that the peer needs.

    Measured with two ranks on two cores, 16 KB: 8 us a round trip with spinning, 39 us without. With three ranks that
    compute 60 to 160 us per message: 256 us a step without, 336 us with 50 us of spinning.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 100 if ranks <= usable_cores() else 0


Wait = Callable[[int, int, int, int], bool]  # (address of counter, known value, ns to spin, ms to sleep) -> it differs
Publish = Callable[[int], None]  # (address of counter)


@functools.cache
def operations() -> tuple[Wait, Publish]:
    """(wait, publish) of the C++ extension, or through system calls where it is not built."""
    from hetis_kernels.dispatch import cpu_op

    wait, publish = cpu_op("shm_wait"), cpu_op("shm_publish")
    if wait is not None and publish is not None:
        return cast(Wait, wait), publish
    return plain_wait, plain_publish


# --- wait and publish through ctypes: every call is a system call -----------------------------------------------------

_FUTEX_WAIT, _FUTEX_WAKE_OP = 0, 5
_FUTEX_OP_ADD = 1
_ALL_WAITERS = 2**31 - 1
_SYS_FUTEX = {"x86_64": 202, "i686": 240, "armv7l": 240, "ppc64le": 221, "s390x": 238}.get(platform.machine(), 98)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def plain_wait(address: int, known: int, spin_ns: int, timeout_ms: int) -> bool:
    """Wait with the contract of `shm_wait` in csrc/cpu/shm.cpp, without spinning."""
    del spin_ns
    count = ctypes.c_uint32.from_address(address)
    known &= 0xFFFFFFFF
    _add(address + 4, 1)
    timeout = _Timespec(timeout_ms // 1000, timeout_ms % 1000 * 1_000_000)
    _futex(address, _FUTEX_WAIT, known, ctypes.addressof(timeout), 0, 0)
    _add(address + 4, -1)
    return count.value != known


def plain_publish(address: int) -> None:
    _add(address, 1)


def _add(address: int, amount: int) -> None:
    """Atomically adds `amount` to the counter and wakes all its waiters, in one system call."""
    operation = _FUTEX_OP_ADD << 28 | (amount & 0xFFF) << 12
    _futex(address, _FUTEX_WAKE_OP, _ALL_WAITERS, 0, address, operation)


def _futex(address: int, operation: int, value: int, timeout: int, second: int, last: int) -> None:
    result = _libc().syscall(
        ctypes.c_long(_SYS_FUTEX),
        ctypes.c_void_p(address),
        ctypes.c_int(operation),
        ctypes.c_uint32(value),
        ctypes.c_void_p(timeout or None),
        ctypes.c_void_p(second or None),
        ctypes.c_uint32(last),
    )
    if result < 0 and ctypes.get_errno() not in {errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR}:
        raise OSError(ctypes.get_errno(), f"futex: {os.strerror(ctypes.get_errno())}")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
