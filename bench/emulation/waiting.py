"""Waiting for a time of the monotonic clock, exact to a few microseconds."""

import time

SPIN_S = 80e-6  # sleeps end 40 to 90 us late with a timer slack of 1 us, 90 to 130 with Linux's default of 50


def sleep_until(at_s: float) -> None:
    """Sleeps, then spins for the last SPIN_S. `at_s`: seconds, monotonic clock."""
    left_s = at_s - time.monotonic() - SPIN_S
    if left_s > 0:
        time.sleep(left_s)
    while time.monotonic() < at_s:
        pass


def precise_timers() -> None:
    """Sets the timer slack of this thread to 1 us (Linux)."""
    import ctypes

    pr_set_timerslack = 29
    ctypes.CDLL(None).prctl(pr_set_timerslack, 1000)
