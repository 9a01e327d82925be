"""Stopwatches: how long a rank does what, as laps from one kind of work to the next, summed for each step.

On the CPU work is done when a call returns, so the clock is read (0.2 us a lap, some five laps a layer). On a CUDA
device calls return at once; there events are recorded between the kernels and read when the step is over.
"""

import time
from typing import Protocol

import numpy as np
import torch

from hetis.core.step_times import Activity

Trace = list[tuple[int, float, float]]  # (activity, begin, end), seconds since the epoch


class Stopwatch(Protocol):
    """Measures one step at a time."""

    def begin(self) -> None:
        """Begins a step, and drops the laps of the one before."""

    def lap(self, activity: Activity) -> int:
        """Counts the time since the last lap (or `begin`) as `activity`. Returns the lap's index in `read`."""

    def read(self) -> Trace:
        """The laps since `begin`."""


def make_stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch for work on `device`."""
    return CudaStopwatch(device) if device.type == "cuda" else HostStopwatch()


class HostStopwatch:
    """Reads the host's clock: for devices that are done when a call returns."""

    def __init__(self) -> None:
        self._epoch = time.time() - time.perf_counter()
        self._activities: list[int] = []
        self._times: list[float] = []

    def begin(self) -> None:
        self._activities.clear()
        self._times.clear()
        self._times.append(time.perf_counter())

    def lap(self, activity: Activity) -> int:
        self._activities.append(activity)
        self._times.append(time.perf_counter())
        return len(self._activities) - 1

    def read(self) -> Trace:
        times = [self._epoch + moment for moment in self._times]
        return list(zip(self._activities, times, times[1:], strict=False))


class CudaStopwatch:
    """Records events on the current stream; they are reused in every step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._activities: list[int] = []
        self._events: list[torch.cuda.Event] = []
        self._began = 0.0

    def begin(self) -> None:
        self._activities.clear()
        self._began = time.time()
        self._record(0)

    def lap(self, activity: Activity) -> int:
        self._activities.append(activity)
        self._record(len(self._activities))
        return len(self._activities) - 1

    def _record(self, index: int) -> None:
        if index == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._events[index].record(torch.cuda.current_stream(self._device))

    def read(self) -> Trace:
        """Waits until the device has done what was launched."""
        self._events[len(self._activities)].synchronize()
        first = self._events[0]
        times = [self._began + first.elapsed_time(event) / 1e3 for event in self._events[: len(self._activities) + 1]]
        return list(zip(self._activities, times, times[1:], strict=False))


def totals_us(trace: Trace) -> list[float]:
    """Microseconds, indexed by `Activity`."""
    totals = [0.0] * len(Activity)
    for activity, begin, end in trace:
        totals[activity] += 1e6 * (end - begin)
    return totals


def pack_trace(trace: Trace) -> bytes:
    """float64 [n, 3] for `StageTimes.trace`."""
    return np.array(trace, dtype=np.float64).tobytes()
