"""What an emulated rank does differently: its core, its pace, its links. Runs before anything of the rank itself."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from .board import Board, Column
from .device_clock import DeviceClock
from .fleet import Emulation, Fleet
from .fleet import Link as LinkSpeed
from .waiting import precise_timers

EMULATION = "HETIS_EMULATION"  # environment variable: a directory with these two files
SETTINGS, BOARD = "emulation.json", "board"
KERNELS = ("paged_decode", "paged_prefill", "kv_append", "page_gather", "page_scatter")


def emulate(rank: int) -> None:
    """Makes this process, which will be `rank`, what the emulation's settings say."""
    directory = Path(os.environ[EMULATION])
    emulation = msgspec.json.decode((directory / SETTINGS).read_bytes(), type=Emulation)
    core = emulation.worker_core if rank else emulation.primary_core
    os.sched_setaffinity(0, {core})  # before torch counts cores; the driver inherits it
    board = Board(directory / BOARD).values[rank]
    precise_timers()
    clock = None
    if rank > 0:
        if emulation.fleet.members[rank].share < max(worker.share for worker in emulation.fleet.workers):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # the fastest of them gets the core at once
        clock = DeviceClock(lambda: float(board[Column.SHARE]))
        slow_down(clock)
    slow_links(emulation.fleet, board, clock)


def slow_down(clock: DeviceClock) -> None:
    """Whoever calls a kernel of this process waits until the emulated device would be done."""
    import hetis_kernels

    for name in KERNELS:
        kernel = vars(hetis_kernels)[name]
        paced = pacing(kernel, clock)
        setattr(hetis_kernels, name, paced)
        setattr(sys.modules[kernel.__module__], name, paced)


def pacing(kernel: Callable[..., Any], clock: DeviceClock) -> Callable[..., Any]:
    def paced(*args: Any, **options: Any) -> Any:
        result = kernel(*args, **options)
        clock.pay()
        return result

    return paced


def slow_links(fleet: Fleet, board: Any, clock: DeviceClock | None) -> None:
    """Every link of this process becomes a `SlowLink`, also those without delay: a slow device needs the stamps."""
    from hetis.comm import links

    from .slow_link import SlowLink, padded

    class CountedLink(SlowLink):
        """Puts its counters, and those of the device, on the board."""

        def recv(self, num_bytes: int) -> Any:
            before = self.num_awaited, self.asked_ns, self.late_ns
            message = super().recv(num_bytes)
            board[Column.AWAITED] += self.num_awaited - before[0]
            board[Column.ASKED_MS] += (self.asked_ns - before[1]) / 1e6
            board[Column.LATE_MS] += (self.late_ns - before[2]) / 1e6
            if clock is not None:
                board[Column.CPU_S], board[Column.BUSY_S] = clock.cpu_s, clock.busy_s
            return message

    open_real = links.open_link

    def open_link(kind: str, rendezvous: Any, *, primary: Any, worker: Any, **options: Any) -> CountedLink:
        for limit in ("max_send_bytes", "max_recv_bytes"):
            options[limit] = padded(options[limit])
        speed: LinkSpeed = fleet.members[worker.rank].link
        inner = open_real(kind, rendezvous, primary=primary, worker=worker, **options)
        if clock is not None:
            clock.start(time.monotonic())  # what it cost to get here is no work of the device
        return CountedLink(inner, speed, clock)

    links.open_link = open_link
