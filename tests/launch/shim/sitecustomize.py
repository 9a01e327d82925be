"""Tests put this on PYTHONPATH: it makes one rank raise (in a step, in loading, in measuring) or stop in measuring,
makes the driver hang at SIGUSR1, and removes system calls that a sandbox may forbid.

hetis itself has no such hook.
"""

import errno
import os
import signal
import sys

_RANK, _, _WHEN = os.environ.get("FAILING_RANK", "").partition(":")


def _no_such_call(*_: object) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _hang(*_: object) -> None:
    while True:
        pass


def _fail(*_: object, **__: object) -> None:
    raise MemoryError("planted failure")


def _stop(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


if _RANK and os.environ.get("RANK") == _RANK and "hetis.launch.member" in sys.orig_argv:
    from hetis.ranks import rank

    if _WHEN == "loading":
        rank.build_member = _fail
    elif _WHEN in ("measuring", "stopping"):
        from hetis.ranks.measuring import devices as measure

        measure.Measurer.measure = _fail if _WHEN == "measuring" else _stop  # type: ignore[assignment, method-assign]
    else:
        rank.PrimaryRank.run_step = _fail  # type: ignore[assignment, method-assign]
        rank.AttentionWorker.run_step = _fail  # type: ignore[assignment, method-assign]

if "HANGING_DRIVER" in os.environ and "hetis.driver.driver" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, _hang)

if "FORBIDDEN_CALLS" in os.environ:  # neither pidfd_open nor prctl, as in some sandboxes and old kernels
    from hetis.processes import supervision

    os.pidfd_open = _no_such_call
    supervision._prctl = lambda *_: None
