"""A device that runs at a share of its core's speed: pauses after work, so that work of t CPU seconds takes t / share.

A quota of the kernel's (cgroup v1 `cpu`, v2 `cpu.max`) was measured and cannot do this. A message of one layer is worth
0.2 to 5 ms of work with idle time between, a quota is a budget per period of at least 5 ms for a share of 0.2 (neither
quota nor period may be below 1 ms), accounted at ticks of 4 ms; what a worker does not use while it waits for the next
layer it may use at full speed afterwards. On Linux 6.18, HZ = 250, mean wall time of bursts of work:

    share 0.5, period 5 ms:   0.5 ms of work, 2 ms idle between   0.51 ms  instead of 1.0
                              2.0 ms of work, 4 ms idle           2.01 ms  instead of 4.0
    share 0.2, period 5 ms:   0.5 ms of work, 2 ms idle           0.60 ms  instead of 2.5
                              2.0 ms of work, 4 ms idle           6.2  ms  instead of 10
    share 0.05, period 20 ms: 0.5 ms of work, 2 ms idle           8.5  ms  instead of 10

Only without idle time is the mean right. Pauses are exact to some microseconds at any grain, and errors do not
add up.
"""

import time
from collections.abc import Callable

from .waiting import sleep_until

MOST_CREDIT_S = 0.2e-3  # by so much may work have begun before the process had its core; messages say exactly


class DeviceClock:
    """The time of an emulated device, which runs on while the process behind it has finished and pauses.

    `free_at` is when the device is done with all it was given. Work between two calls of `pay` moves it on by CPU time
    / share, then the process sleeps until then. So it does not matter if the process got its core late, or slept too
    long: the next pause is shorter. One thread's CPU time counts: ranks here have one thread that works.
    """

    def __init__(
        self,
        share: Callable[[], float],
        *,
        wall: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
        sleep_until: Callable[[float], None] = sleep_until,
    ) -> None:
        self._share, self._wall, self._cpu, self._sleep_until = share, wall, cpu, sleep_until
        self._cpu_before = cpu()
        self._seen_until = self.free_at = wall()
        self.cpu_s = 0.0  # of all work so far
        self.busy_s = 0.0  # wall time from the start of work until the process went on after its pause

    def start(self, at: float) -> None:
        """The device had nothing to do before `at`: what came then is taken up now."""
        self.free_at = max(self.free_at, at)
        self._cpu_before = self._cpu()

    def pay(self) -> None:
        """Returns when the device is done with all work since the last call."""
        now, cpu = self._wall(), self._cpu()
        used = cpu - self._cpu_before
        begin = max(self.free_at, now - used - MOST_CREDIT_S)
        self.free_at = begin + used / self._share()
        if self.free_at > now:
            self._sleep_until(self.free_at)
            now = self._wall()
        self.cpu_s += used
        self.busy_s += now - max(begin, self._seen_until)
        self._seen_until = now
        self._cpu_before = self._cpu()  # going to sleep is no work of the device
