"""Memory shared by processes of one host, with counters in it to wait for.

The memory is a memfd, which has no name: the peer opens `/proc/<pid>/fd/<descriptor>` of its creator, and the kernel
frees it with the last process that maps it, however that process ends. Nothing can be left over.
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

WORD_BYTES = 128  # a counter has its cache line to itself, and the neighbour that the processor fetches with it
PAGE_BYTES = 4096
LOOK_AROUND_MS = 100  # longest sleep before the peer's life and Python's signals are looked at


class Address(msgspec.Struct, frozen=True):
    """Where another process of this host finds a segment."""

    pid: int
    descriptor: int
    num_bytes: int


class Segment:
    """A stretch of shared memory, zero at first: `num_words` counters, then whatever the user lays out from `start`."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Maps `descriptor`, which the segment owns from now on."""
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
        """ConnectionError if the creator is gone; ValueError if it is not ours to look into."""
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
        """The address of counter `index` in this process, for as long as the segment lives."""
        return int(self.memory_B.data_ptr()) + index * WORD_BYTES

    def close(self) -> None:
        """The memory itself goes with the last tensor that shows it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Peer:
    """A process of this host on whose counters we wait."""

    def __init__(self, rank: int, pid: int) -> None:
        self.rank, self.pid = rank, pid
        self._pidfd = supervision.open_pidfd(pid)
        self._poll = select.poll()
        if self._pidfd is not None:
            self._poll.register(self._pidfd, select.POLLIN)

    def is_alive(self) -> bool:
        return not (supervision.has_ended(self.pid) if self._pidfd is None else self._poll.poll(0))

    def check(self) -> None:
        if not self.is_alive():
            raise ConnectionError(f"rank {self.rank} (pid {self.pid}) {failure.end_of(self.pid)}.")

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


class Waiter:
    """Waits for counters to change, for `spin_us` with the core and then asleep."""

    def __init__(self, spin_us: int) -> None:
        self._spin_ns = 1000 * spin_us
        self._wait, self.publish = operations()

    def wait(self, word: int, known: int, check: Callable[[], None]) -> None:
        """Until the counter differs from `known`. `check` raises once no process will change it any more."""
        while not self._wait(word, known, self._spin_ns, LOOK_AROUND_MS):
            try:
                check()
            except ConnectionError:
                if self._wait(word, known, 0, 0):  # its last act
                    return
                raise

    def differs(self, word: int, known: int) -> bool:
        """Without waiting."""
        return self._wait(word, known, 0, 0)


def default_spin_us() -> int:
    """How long to wait with the core: 0 where ranks outnumber the cores they may use, for it steals from the peer then.

    Measured with two ranks on two cores, 16 KB: 8 us a round trip with spinning, 39 us without. With three ranks that
    work 60 to 160 us per message: 256 us a step without, 336 us with 50 us of spinning.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 100 if ranks <= usable_cores() else 0


Wait = Callable[[int, int, int, int], bool]  # (address of counter, known value, ns to spin, ms to sleep) -> it differs
Publish = Callable[[int], None]  # (address of counter)


@functools.cache
def operations() -> tuple[Wait, Publish]:
    """(wait, publish): from the extension, or through plain system calls where it is not built."""
    from hetis_kernels.dispatch import cpu_op

    wait, publish = cpu_op("shm_wait"), cpu_op("shm_publish")
    if wait is not None and publish is not None:
        return cast(Wait, wait), publish
    return plain_wait, plain_publish


# --- the same through ctypes: every wait and every publication is a system call ---------------------------------------

_FUTEX_WAIT, _FUTEX_WAKE_OP = 0, 5
_FUTEX_OP_ADD = 1
_EVERYBODY = 2**31 - 1
_SYS_FUTEX = {"x86_64": 202, "i686": 240, "armv7l": 240, "ppc64le": 221, "s390x": 238}.get(platform.machine(), 98)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def plain_wait(address: int, known: int, spin_ns: int, timeout_ms: int) -> bool:
    """As `csrc/cpu/shm.cpp`, without spinning."""
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
    """Atomically `*address += amount`, and wake all who wait for it: the kernel can do both in one call."""
    operation = _FUTEX_OP_ADD << 28 | (amount & 0xFFF) << 12
    _futex(address, _FUTEX_WAKE_OP, _EVERYBODY, 0, address, operation)


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
