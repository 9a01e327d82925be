"""Which rank failed, and why: one failure reason from heartbeats, ends of processes and reports of ranks.

When one rank dies others fail too, some moments later or earlier, and a launcher ends the rest. So the first sign of a
failure starts a grace period in which better explanations may come in. The best one is the reason:

    a rank's own error; a process that ended; a rank that is silent; a rank that ended before it had joined;
    a lost connection; an end that was asked for.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping

from hetis.core.device_info import DeviceInfo
from hetis.core.messages import Failure
from hetis.core.plan import Plan
from hetis.processes import supervision
from hetis.processes.failure import END_REQUESTED, FailureReason, describe_end, ended_by_request, member_name

GRACE_SECONDS = 1.0
JOIN_SECONDS = 300.0
SILENT_SECONDS = 2.0  # eight heartbeats: long enough to be suspected when something else is wrong
_WHY_SILENT = "it is stopped, or its host is gone"


class FleetFailedError(Exception):
    """The fleet cannot go on. `pids_to_kill`: by host, since a stopped process cannot end itself."""

    def __init__(self, text: str, pids_to_kill: Mapping[str, list[int]] | None = None, refused: bool = False) -> None:
        super().__init__(text)
        self.reason = FailureReason(text, refused)
        self.pids_to_kill = dict(pids_to_kill or {})


class Watch:
    """Signs of life of one fleet."""

    def __init__(self, plan: Plan, step_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`step_timeout`: seconds without a heartbeat, or for one step, after which ranks count as dead."""
        self._plan, self._timeout, self._clock = plan, step_timeout, clock
        self._begin = clock()
        self._infos: dict[int, DeviceInfo] = {}  # of the ranks that have joined
        self.pid_fds: dict[int, int] = {}  # descriptor -> rank, of living processes on this host
        self._last_sign: dict[int, float] = {}
        self._last_step: dict[int, int] = {}
        self._failures: list[Failure] = []
        self._ended: dict[int, int | None] = {}  # rank -> wait status
        self._first_sign: float | None = None  # of a failure
        self._started: dict[int, float] = {}  # step in flight -> when it was sent

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
        """Rank 0, the driver's parent, has ended. If its launcher asked for that, it asks all other ranks, too."""
        self._ended.setdefault(0, status)
        self._note()
        if ended_by_request(status):
            self._first_sign = -math.inf  # no rank is left to explain anything

    def _note(self) -> None:
        if self._first_sign is None:
            self._first_sign = self._clock()

    def living(self) -> list[int]:
        """Ranks that still run: by their process on this host, by their heartbeat elsewhere."""
        here = set(self.pid_fds.values())
        return [
            rank for rank in self._infos if rank in here or (rank not in self._ended and not self._silent([rank], 1.0))
        ]

    def pid_here(self, rank: int) -> int | None:
        """The pid of a rank that lives on this host."""
        return self._infos[rank].pid if rank in self.pid_fds.values() else None

    def in_flight_seconds(self) -> float:
        """Age of the oldest step that has not come back; 0 without one."""
        return self._clock() - min(self._started.values()) if self._started else 0.0

    def silent_seconds(self) -> dict[int, float]:
        """Seconds since the last sign of life, of every rank that has joined."""
        now = self._clock()
        return {rank: now - last for rank, last in self._last_sign.items()}

    def describe_silent(self) -> list[str]:
        """One sentence for each rank that has been silent for longer than `SILENT_SECONDS`."""
        return [
            f"{self._name(rank)} has sent no heartbeat for {seconds:.1f} s; last step {self._last_step.get(rank, -1)}"
            for rank, seconds in sorted(self.silent_seconds().items())
            if seconds > SILENT_SECONDS
        ]

    # --- what it means ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises FleetFailedError when the fleet cannot go on."""
        now = self._clock()
        if self._first_sign is not None:
            if self._own_errors() or now - self._first_sign > GRACE_SECONDS:
                raise self._best_reason()
            return
        dead = self._silent(self._infos, self._timeout)
        if dead:
            raise self._stuck(dead, f"did not answer within --step-timeout ({self._timeout:g} s): {_WHY_SILENT}")
        if self._started and now - min(self._started.values()) > self._timeout:
            raise self._late(min(self._started))
        if self._missing() and now - self._begin > JOIN_SECONDS:
            raise FleetFailedError(f"{self._names(self._missing())} did not join within {JOIN_SECONDS:.0f} s.")

    def _best_reason(self) -> FleetFailedError:
        for failure in self._own_errors():
            is_mistake = not failure.traceback  # of the user
            return FleetFailedError(failure.reason, refused=True) if is_mistake else self._failed(failure)
        reported = {failure.rank for failure in self._failures}
        for rank, status in self._ended.items():
            if rank not in reported and not ended_by_request(status):
                return FleetFailedError(f"{self._name(rank)} {describe_end(status)}.")
        silent = self._silent(set(self._infos) - set(self._ended) - reported, SILENT_SECONDS)
        if silent:
            return self._silence(silent)
        missing = [rank for rank in self._missing() if rank not in self._ended]
        if missing:
            return FleetFailedError(f"{self._names(missing)} ended before the fleet was up, or never started.")
        for failure in self._failures:
            if failure.reason != END_REQUESTED:
                return self._failed(failure)
        return FleetFailedError(f"{self._names(sorted(reported | set(self._ended)))} {END_REQUESTED}.")

    def _own_errors(self) -> list[Failure]:
        return [failure for failure in self._failures if not failure.is_consequence]

    def _failed(self, failure: Failure) -> FleetFailedError:
        return FleetFailedError(f"{self._name(failure.rank)} failed: {failure.reason}")

    def _silence(self, ranks: list[int]) -> FleetFailedError:
        seconds = self._clock() - min(self._last_sign[rank] for rank in ranks)
        return self._stuck(ranks, f"has not answered for {seconds:.1f} s: {_WHY_SILENT}")

    def _late(self, step: int) -> FleetFailedError:
        """The error for a step that does not end. Silent ranks are a likelier cause than ranks that wait for them."""
        silent = self._silent(self._infos, SILENT_SECONDS)
        if silent:
            return self._silence(silent)
        late = [rank for rank, done in self._last_step.items() if done < step and rank in self._infos]
        what = f"did not finish step {step} within --step-timeout ({self._timeout:g} s)"
        return self._stuck(late or list(self._infos), what)

    def _stuck(self, ranks: list[int], what: str) -> FleetFailedError:
        """`what`: the rest of a sentence that begins with the names of these ranks, whose processes must be killed."""
        pids: dict[str, list[int]] = {}
        for rank in ranks:
            pids.setdefault(self._infos[rank].host, []).append(self._infos[rank].pid)
        return FleetFailedError(f"{self._names(ranks)} {what}.", pids)

    def _silent(self, ranks: Iterable[int], seconds: float) -> list[int]:
        now = self._clock()
        return [rank for rank in ranks if now - self._last_sign[rank] > seconds]

    def _missing(self) -> list[int]:
        """Ranks that have not joined."""
        return [rank for rank in self._plan.ranks if rank not in self._infos]

    def _names(self, ranks: Iterable[int]) -> str:
        return ", ".join(self._name(rank) for rank in ranks)

    def _name(self, rank: int) -> str:
        return member_name(self._plan, rank, self._infos[rank].device if rank in self._infos else None)
