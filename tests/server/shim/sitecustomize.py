"""Put on PYTHONPATH by tests: lets one rank raise (in a step, while it loads, while it measures) or stop in measuring.

Product code has no such hook.
"""

import os
import signal
import sys

_RANK, _, _WHEN = os.environ.get("FAILING_RANK", "").partition(":")


def _fail(*_: object, **__: object) -> None:
    raise MemoryError("planted failure")


def _stop(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


if (
    _RANK
    and os.environ.get("RANK") == _RANK
    and "HETIS_FRONT" not in os.environ
    and "hetis.engine.driver" not in sys.orig_argv
):
    from hetis.workers import rank

    if _WHEN == "loading":
        rank.build_member = _fail
    elif _WHEN in ("measuring", "stopping"):
        from hetis.workers import measure

        measure.Measurer.measure = _fail if _WHEN == "measuring" else _stop  # type: ignore[assignment, method-assign]
    else:
        rank.PrimaryRank.run_step = _fail  # type: ignore[assignment, method-assign]
        rank.AttentionRank.run_step = _fail  # type: ignore[assignment, method-assign]
