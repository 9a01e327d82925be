"""An emulated device: its memory runs at a share of a core's speed, its arithmetic at the core's.

After a kernel the process pauses until the emulated device would have finished:

    decode attention, append, page transfers    CPU time of the kernel / share
    linear layers                               at least bytes of the weight / (share * CORE_BYTES_PER_S)
    attention of prompts, norms                 the core's own time

An attention worker therefore runs at a share of its core, because all its work is bound by memory. A primary with a
share below 1 has a higher ratio of arithmetic to bandwidth than the core, as accelerators do: the core multiplies four
rows in the time of reading a weight; a share of 1/4 raises that to some 20 (an A100: 150). Without it batching would
hardly pay, and neither would KV memory for larger batches.

A CPU quota of the kernel (cgroup v1 `cpu`, v2 `cpu.max`) was measured and does not work. A message of one layer causes
0.2 to 5 ms of work with idle time between. A quota is a budget per period of at least 5 ms for a share of 0.2 (neither
quota nor period may be below 1 ms), accounted at ticks of 4 ms, and the budget that a worker saves while it waits for
the next layer it then spends at full speed. On Linux 6.18, HZ = 250, mean wall time of bursts of work:

    share 0.5, period 5 ms:   0.5 ms of work, 2 ms idle between   0.51 ms  instead of 1.0
                              2.0 ms of work, 4 ms idle           2.01 ms  instead of 4.0
    share 0.2, period 5 ms:   0.5 ms of work, 2 ms idle           0.60 ms  instead of 2.5
                              2.0 ms of work, 4 ms idle           6.2  ms  instead of 10
    share 0.05, period 20 ms: 0.5 ms of work, 2 ms idle           8.5  ms  instead of 10

The mean is right only without idle time. Pauses are exact to a few microseconds at any duration.
"""

import time
from collections.abc import Callable
from typing import Any

from .waiting import sleep_until

CALL_S = 15e-6  # overhead of the call within a kernel's CPU time, which is not slowed
CORE_BYTES_PER_S = 17e9  # at which one core reads weights (bench/bench_linear.py --threads 1 --dtype float32)


class Device:
    """Runs kernels at the speed of an emulated device. For one thread."""

    def __init__(
        self,
        share: Callable[[], float],
        *,
        wall: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
        sleep_until: Callable[[float], None] = sleep_until,
    ) -> None:
        """`share` is called after every kernel. `wall`, `cpu`, `sleep_until`: seconds."""
        self._share, self._wall, self._cpu, self._sleep_until = share, wall, cpu, sleep_until
        self.work_s = 0.0  # CPU time of kernels bound by memory, without call overhead
        self.busy_s = 0.0  # wall time of these kernels, pauses included

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
