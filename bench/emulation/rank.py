"""Patches of an emulated rank: its core, its speed, its links. Applied before the rank's own code runs."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec

from .board import Board, Column
from .device import Device
from .fleet import Emulation, Fleet
from .waiting import precise_timers

EMULATION = "HETIS_EMULATION"  # environment variable: a directory with the next two files
SETTINGS, BOARD = "emulation.json", "board"
BOUND_BY_MEMORY = ("paged_decode", "kv_append", "page_gather", "page_scatter", "stream_read")


def emulate(rank: int) -> None:
    """Applies the emulation's settings to this process, which is about to become `rank`."""
    emulation = use_core(is_worker=bool(rank))  # before torch counts cores
    precise_timers()
    board = Board(Path(os.environ[EMULATION]) / BOARD).values[rank]
    if rank or emulation.fleet.primary.share < 1:
        slow_kernels(board)
    touch_pools()
    slow_links(emulation.fleet, board)


def use_core(is_worker: bool) -> Emulation:
    """Keeps this process on the core of the workers, or of the primary and the driver; the settings."""
    emulation = msgspec.json.decode((Path(os.environ[EMULATION]) / SETTINGS).read_bytes(), type=Emulation)
    os.sched_setaffinity(0, {emulation.worker_core if is_worker else emulation.primary_core})
    return emulation


def slow_kernels(board: Any) -> None:
    """Operations of the C++ extension return only when the emulated device would have finished."""
    from hetis_kernels import dispatch, linear

    class ReportingDevice(Device):
        def run_bound_by_memory(self, kernel: Callable[..., Any], *arguments: Any) -> Any:
            result = super().run_bound_by_memory(kernel, *arguments)
            board[Column.WORK_S], board[Column.BUSY_S] = self.work_s, self.busy_s
            return result

    device = ReportingDevice(lambda: float(board[Column.SHARE]))
    real_cpu_op, real_linear = dispatch.cpu_op, linear.linear

    @cache
    def cpu_op(name: str) -> Callable[..., Any] | None:
        operation = real_cpu_op(name)
        if operation is None or name not in BOUND_BY_MEMORY:
            return operation
        return partial(device.run_bound_by_memory, operation)

    def slow_linear(x_TK: Any, packed: Any, out_TN: Any = None) -> Any:
        return device.run_linear(packed.weight.nbytes, real_linear, x_TK, packed, out_TN)

    assert real_cpu_op("paged_decode") is not None, "an emulated device needs the C++ extension"
    dispatch.cpu_op, linear.linear = cpu_op, slow_linear  # type: ignore[assignment]


def touch_pools() -> None:
    """Writes to new page pools once: on a CPU the first write to memory is slow, on the emulated devices it is not."""
    from hetis.ranks.pool import PagePool

    make = PagePool.__init__

    def make_and_touch(self: PagePool, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        self.pages_L2PSD.zero_()

    PagePool.__init__ = make_and_touch  # type: ignore[method-assign]


def slow_links(fleet: Fleet, board: Any) -> None:
    """Wraps both ends of emulated slow links in `SlowLink`."""
    from hetis.comm import links

    from .slow_link import SlowLink, padded

    class ReportingLink(SlowLink):
        def recv(self, num_bytes: int) -> Any:
            before = self.num_awaited, self.asked_ns, self.late_ns
            message = super().recv(num_bytes)
            board[Column.AWAITED] += self.num_awaited - before[0]
            board[Column.ASKED_MS] += (self.asked_ns - before[1]) / 1e6
            board[Column.LATE_MS] += (self.late_ns - before[2]) / 1e6
            return message

    open_real = links.open_link

    def open_link(kind: str, rendezvous: Any, *, primary: Any, worker: Any, **options: Any) -> Any:
        speed = fleet.members[worker.rank].link
        if speed.is_plain:
            return open_real(kind, rendezvous, primary=primary, worker=worker, **options)
        for limit in ("max_send_bytes", "max_recv_bytes"):
            options[limit] = padded(options[limit])
        return ReportingLink(open_real(kind, rendezvous, primary=primary, worker=worker, **options), speed)

    links.open_link = open_link
