"""Waiting for a moment of the monotonic clock, to some microseconds."""

import time

SPIN_S = 80e-6  # a sleep ends 40 to 90 us late here, with timers allowed to be late by 1 us; 90 to 130 with Linux's 50


def sleep_until(at_s: float) -> None:
    """Sleeps, and waits for the last moment with the core."""
    left_s = at_s - time.monotonic() - SPIN_S
    if left_s > 0:
        time.sleep(left_s)
    while time.monotonic() < at_s:
        pass


def precise_timers() -> None:
    """Timers of this thread may be late by 1 us (Linux)."""
    import ctypes

    pr_set_timerslack = 29
    ctypes.CDLL(None).prctl(pr_set_timerslack, 1000)
