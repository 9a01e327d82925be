"""A device made of a core: its memory runs at a share of the core's speed, its arithmetic at the core's.

After a kernel the process pauses until the device would be done:

    decode attention, appending, pages on the move    CPU time of the kernel / share
    linear layers                                     at least bytes of the weight / (share * CORE_BYTES_PER_S)
    attention of prompts, norms                       as the core does it

For an attention worker that is a share of its core, for all that it computes is bound by memory. A primary with a share
below 1 has more arithmetic for its memory than the core, as accelerators do: the core multiplies four rows in the time
in which it reads a weight, a share of 1/4 makes that some 20 (an A100: 150). Without that, sequences that are computed
together would hardly be cheaper than one by one, and memory for more of them hardly be worth having.

A quota of the kernel's (cgroup v1 `cpu`, v2 `cpu.max`) was measured and cannot do this. A message of one layer is worth
0.2 to 5 ms of work with idle time between, a quota is a budget per period of at least 5 ms for a share of 0.2 (neither
quota nor period may be below 1 ms), accounted at ticks of 4 ms; what a worker does not use while it waits for the next
layer it may use at full speed afterwards. On Linux 6.18, HZ = 250, mean wall time of bursts of work:

    share 0.5, period 5 ms:   0.5 ms of work, 2 ms idle between   0.51 ms  instead of 1.0
                              2.0 ms of work, 4 ms idle           2.01 ms  instead of 4.0
    share 0.2, period 5 ms:   0.5 ms of work, 2 ms idle           0.60 ms  instead of 2.5
                              2.0 ms of work, 4 ms idle           6.2  ms  instead of 10
    share 0.05, period 20 ms: 0.5 ms of work, 2 ms idle           8.5  ms  instead of 10

Only without idle time is the mean right. Pauses are exact to some microseconds at any grain.
"""

import time
from collections.abc import Callable
from typing import Any

from .waiting import sleep_until

CALL_S = 15e-6  # of a kernel's CPU time that goes into calling it, and not into memory
CORE_BYTES_PER_S = 17e9  # at which one core reads weights (bench/bench_linear.py --threads 1 --dtype float32)


class Device:
    """Runs kernels at the pace of an emulated device. One thread."""

    def __init__(
        self,
        share: Callable[[], float],
        *,
        wall: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
        sleep_until: Callable[[float], None] = sleep_until,
    ) -> None:
        """`share` is asked after every kernel."""
        self._share, self._wall, self._cpu, self._sleep_until = share, wall, cpu, sleep_until
        self.work_s = 0.0  # CPU time of kernels bound by memory, without the calls
        self.busy_s = 0.0  # wall time that they took with their pauses

    def run_bound_by_memory(self, kernel: Callable[..., Any], *arguments: Any) -> Any:
        begin, cpu = self._wall(), self._cpu()
        result = kernel(*arguments)
        work = self._cpu() - cpu - CALL_S
        if work > 0:
            self._sleep_until(begin + CALL_S + work / self._share())
            self.work_s += work
            self.busy_s += self._wall() - begin - CALL_S
        return result

    def run_linear(self, weight_bytes: int, kernel: Callable[..., Any], *arguments: Any) -> Any:
        begin = self._wall()
        result = kernel(*arguments)
        self._sleep_until(begin + weight_bytes / (self._share() * CORE_BYTES_PER_S))
        return result
