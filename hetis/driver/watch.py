"""Which rank failed, and why: heartbeats, ends of processes and reports of ranks, condensed into one verdict.

When one rank dies others fail too, moments later or moments earlier, and a launcher ends the rest. So a first
sign opens a short time of grace in which better explanations may come in. The best one wins:

    a rank's own error; a process that ended; a rank that has gone silent; a rank that ended before it had joined;
    a lost connection; an end that was asked for.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping

from hetis.comm.control import TOLD_TO_END
from hetis.core.device_info import DeviceInfo
from hetis.core.messages import Failure
from hetis.core.plan import Plan
from hetis.processes import supervision

GRACE_SECONDS = 1.0
JOIN_SECONDS = 300.0
SILENT_SECONDS = 2.0  # eight heartbeats: long enough to be suspected when something else is wrong
_WHY_SILENT = "it is stopped, or its host is gone"


class FleetFailedError(Exception):
    """The verdict. `culprits`: pids to kill by host, for a process that is stopped cannot end itself."""

    def __init__(self, reason: str, culprits: Mapping[str, list[int]] | None = None, refused: bool = False) -> None:
        super().__init__(reason)
        self.culprits = dict(culprits or {})
        self.refused = refused


def verdict_on(error: Exception, is_up: bool) -> FleetFailedError:
    """What an error in the driver means. Until the fleet is up a ValueError is the user's: a plan that does not fit."""
    if isinstance(error, ValueError) and not is_up:
        return FleetFailedError(str(error), refused=True)
    return FleetFailedError(f"the driver failed: {type(error).__name__}: {error}")


class Watch:
    """Signs of life of one fleet."""

    def __init__(self, plan: Plan, step_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan, self._timeout, self._clock = plan, step_timeout, clock
        self._begin = clock()
        self._infos: dict[int, DeviceInfo] = {}
        self.pid_fds: dict[int, int] = {}  # descriptor -> rank, of the living
        self._last_sign: dict[int, float] = {}
        self._last_step: dict[int, int] = {}
        self._failures: list[Failure] = []
        self._ended: dict[int, int | None] = {}  # rank -> wait status
        self._first_sign: float | None = None
        self._started: dict[int, float] = {}  # step in flight -> since

    # --- what is seen -------------------------------------------------------------------------------------------------

    def on_hello(self, info: DeviceInfo) -> int | None:
        """Returns a descriptor that becomes readable when the rank's process ends, if it runs on this host."""
        self._infos[info.rank] = info
        self._last_sign[info.rank] = self._clock()
        if info.host != supervision.host_id():
            return None
        fd = supervision.open_pidfd(info.pid)
        if fd is not None:
            self.pid_fds[fd] = info.rank
        elif supervision.has_ended(info.pid):  # after it had sent its hello
            self._ended[info.rank] = supervision.wait_status(info.pid)
            self._note()
        return fd

    def on_heartbeat(self, rank: int, step: int) -> None:
        self._last_sign[rank], self._last_step[rank] = self._clock(), step

    def on_step(self, step: int) -> None:
        self._started[step] = self._clock()

    def on_result(self, step: int) -> None:
        self._started.pop(step, None)

    def on_failure(self, failure: Failure) -> None:
        self._failures.append(failure)
        self._note()

    def on_death(self, fd: int) -> None:
        rank = self.pid_fds.pop(fd)
        self._ended[rank] = supervision.wait_status(self._infos[rank].pid)
        self._note()

    def on_parent_death(self, status: int | None) -> None:
        """Rank 0, which started the driver, is gone; if its launcher wanted that, it ends all other ranks, too."""
        self._ended.setdefault(0, status)
        self._note()
        if supervision.ended_by_request(status):
            self._first_sign = -math.inf  # no rank is left to explain anything

    def _note(self) -> None:
        if self._first_sign is None:
            self._first_sign = self._clock()

    def living(self) -> list[int]:
        """Ranks that still run, as far as one can see: by their process on this host, by their heartbeat elsewhere."""
        here = set(self.pid_fds.values())
        return [
            rank for rank in self._infos if rank in here or (rank not in self._ended and not self._silent([rank], 1.0))
        ]

    def pid_here(self, rank: int) -> int | None:
        """The pid of a rank that lives on this host."""
        return self._infos[rank].pid if rank in self.pid_fds.values() else None

    # --- what it means ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """FleetFailedError when the fleet cannot go on."""
        now = self._clock()
        if self._first_sign is not None:
            if self._own_errors() or now - self._first_sign > GRACE_SECONDS:
                self._condemn()
            return
        dead = self._silent(self._infos, self._timeout)
        if dead:
            self._condemn_stuck(dead, f"did not answer within --step-timeout ({self._timeout:g} s): {_WHY_SILENT}")
        if self._started and now - min(self._started.values()) > self._timeout:
            self._condemn_late(min(self._started))
        if self._missing() and now - self._begin > JOIN_SECONDS:
            raise FleetFailedError(f"{self._names(self._missing())} did not join within {JOIN_SECONDS:.0f} s.")

    def _condemn(self) -> None:
        """The best explanation of what was seen."""
        for failure in self._own_errors():
            if not failure.traceback:  # a mistake of the user's, told in one sentence
                raise FleetFailedError(failure.reason, refused=True)
            raise FleetFailedError(f"{self._name(failure.rank)} failed: {failure.reason}")
        spoke = {failure.rank for failure in self._failures}
        for rank, status in self._ended.items():
            if rank not in spoke and not supervision.ended_by_request(status):
                raise FleetFailedError(f"{self._name(rank)} {supervision.describe_end(status)}.")
        silent = self._silent(set(self._infos) - set(self._ended) - spoke, SILENT_SECONDS)
        if silent:
            self._condemn_silent(silent)
        missing = [rank for rank in self._missing() if rank not in self._ended]
        if missing:
            raise FleetFailedError(f"{self._names(missing)} ended before the fleet was up, or never started.")
        for failure in self._failures:
            if failure.reason != TOLD_TO_END:
                raise FleetFailedError(f"{self._name(failure.rank)} failed: {failure.reason}")
        told = sorted(spoke | set(self._ended))
        raise FleetFailedError(f"{self._names(told)} {TOLD_TO_END}.")

    def _own_errors(self) -> list[Failure]:
        return [failure for failure in self._failures if not failure.is_consequence]

    def _condemn_silent(self, ranks: list[int]) -> None:
        seconds = self._clock() - min(self._last_sign[rank] for rank in ranks)
        self._condemn_stuck(ranks, f"has not answered for {seconds:.1f} s: {_WHY_SILENT}")

    def _condemn_late(self, step: int) -> None:
        """A step that does not end: those that say nothing are more likely the cause than those that wait for them."""
        silent = self._silent(self._infos, SILENT_SECONDS)
        if silent:
            self._condemn_silent(silent)
        late = [rank for rank, done in self._last_step.items() if done < step and rank in self._infos]
        what = f"did not finish step {step} within --step-timeout ({self._timeout:g} s)"
        self._condemn_stuck(late or list(self._infos), what)

    def _condemn_stuck(self, ranks: list[int], what: str) -> None:
        culprits: dict[str, list[int]] = {}
        for rank in ranks:
            culprits.setdefault(self._infos[rank].host, []).append(self._infos[rank].pid)
        raise FleetFailedError(f"{self._names(ranks)} {what}.", culprits)

    def _silent(self, ranks: Iterable[int], seconds: float) -> list[int]:
        now = self._clock()
        return [rank for rank in ranks if now - self._last_sign[rank] > seconds]

    def _missing(self) -> list[int]:
        """Ranks that never joined."""
        return [rank for rank in self.plan.ranks if rank not in self._infos]

    def _names(self, ranks: Iterable[int]) -> str:
        return ", ".join(self._name(rank) for rank in ranks)

    def _name(self, rank: int) -> str:
        device = self._infos[rank].device if rank in self._infos else self.plan.device_of(rank)
        return f"rank {rank} ({self.plan.role_of(rank)} on {device})"
