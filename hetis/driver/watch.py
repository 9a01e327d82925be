"""Which rank failed, and why: one failure reason from heartbeats, reports of ranks, and what agents see and are asked.

When one rank dies others fail too, some moments later or earlier, and a launcher ends the rest. So the first sign of a
failure starts a grace period in which better explanations may come in. The best one is the reason:

    a rank's own error; a process that ended; a rank that is silent; a rank that never joined; a lost connection.

If nothing but a launcher's request to end is left, that is no failure: the root decides how the fleet ends.
"""

import time
from collections.abc import Callable, Iterable

from hetis.core.device_info import DeviceInfo
from hetis.core.messages import Failure
from hetis.core.plan import Plan
from hetis.processes.failure import END_REQUESTED, FailureReason, describe_end, member_name

GRACE_SECONDS = 1.0
JOIN_SECONDS = 300.0
SILENT_SECONDS = 2.0  # eight heartbeats: long enough to be suspected when something else is wrong
REQUEST_GRACE_SECONDS = 2.5  # a launcher that sees a process die asks all others to end: that one must be silent first
REQUEST_SECONDS = 25.0  # that the root has to end the fleet; torchrun kills its processes after 30
_WHY_SILENT = "it is stopped, or its host is gone"


class FleetFailedError(Exception):
    """The fleet cannot go on."""

    def __init__(self, text: str, refused: bool = False) -> None:
        super().__init__(text)
        self.reason = FailureReason(text, refused)


class Watch:
    """Signs of life of one fleet."""

    def __init__(self, plan: Plan, step_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`step_timeout`: seconds without a heartbeat, or for one step, after which ranks count as dead."""
        self._plan, self._timeout, self._clock = plan, step_timeout, clock
        self._begin = clock()
        self._infos: dict[int, DeviceInfo] = {}  # of the ranks that have joined
        self._last_sign: dict[int, float] = {}
        self._last_step: dict[int, int] = {}
        self._failures: list[Failure] = []
        self._ended: dict[int, int] = {}  # rank -> wait status
        self._first_sign: float | None = None  # of a failure
        self._asked: set[int] = set()  # ranks whose agents were asked to end
        self._first_request: float | None = None
        self.end_request: str | None = None  # the sentence for the root, once nothing explains the request
        self._started: dict[int, float] = {}  # step in flight -> when it was sent
        self._last_result = self._begin  # when a step came back

    # --- what is seen -------------------------------------------------------------------------------------------------

    def on_hello(self, info: DeviceInfo) -> None:
        self._infos[info.rank] = info
        self._last_sign[info.rank] = self._clock()

    def on_heartbeat(self, rank: int, step: int) -> None:
        self._last_sign[rank], self._last_step[rank] = self._clock(), step

    def on_step(self, step: int) -> None:
        self._started[step] = self._clock()

    def on_result(self, step: int) -> None:
        self._started.pop(step, None)
        self._last_result = self._clock()

    def on_failure(self, failure: Failure) -> None:
        self._failures.append(failure)
        self._note()

    def on_end(self, rank: int, status: int) -> None:
        """The process of a rank has ended. `status`: as `os.wait` gives it."""
        self._ended[rank] = status
        self._note()

    def on_request(self, ranks: Iterable[int]) -> None:
        """The agent of these ranks was asked to end."""
        self._asked.update(ranks)
        if self._first_request is None:
            self._first_request = self._clock()

    def _note(self) -> None:
        if self._first_sign is None:
            self._first_sign = self._clock()

    def in_flight_seconds(self) -> float:
        """How long ranks have been at the oldest step that has not come back; 0 without one.

        It counts from the moment when the step was sent, or the one before it came back: ranks get a step while they
        compute another.
        """
        if not self._started:
            return 0.0
        return self._clock() - max(self._last_result, min(self._started.values()))

    def silent_seconds(self) -> dict[int, float]:
        """Seconds since the last sign of life, of every rank that has joined."""
        now = self._clock()
        return {rank: now - last for rank, last in self._last_sign.items()}

    def describe_silent(self) -> list[str]:
        """One sentence for each rank that has been silent for longer than `SILENT_SECONDS`."""
        return [
            f"{self._name(rank)} has sent no heartbeat for {seconds:.1f} s; {self._progress_of(rank)}"
            for rank, seconds in sorted(self.silent_seconds().items())
            if seconds > SILENT_SECONDS
        ]

    def _progress_of(self, rank: int) -> str:
        step = self._last_step.get(rank, -1)
        return "it has finished no step" if step < 0 else f"last step {step}"

    # --- what it means ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises FleetFailedError when the fleet cannot go on."""
        now = self._clock()
        if self._first_sign is not None:
            if self._own_errors() or now - self._first_sign > GRACE_SECONDS:
                raise self._best_reason()
            return
        if self._first_request is not None:
            self._check_request(now - self._first_request)
        dead = self._silent(self._infos, self._timeout)
        if dead:
            what = f"did not answer within --step-timeout ({self._timeout:g} s): {_WHY_SILENT}"
            raise FleetFailedError(f"{self._names(dead)} {what}.")
        if self.in_flight_seconds() > self._timeout:
            raise self._late(min(self._started))
        if self._missing() and now - self._begin > JOIN_SECONDS:
            raise FleetFailedError(f"{self._names(self._missing())} did not join within {JOIN_SECONDS:.0f} s.")

    def _check_request(self, seconds: float) -> None:
        """`seconds`: since the first request."""
        if self.end_request is None and seconds > REQUEST_GRACE_SECONDS:
            if silent := self._silent(self._infos, SILENT_SECONDS):
                raise self._silence(silent)
            if missing := [rank for rank in self._missing() if rank not in self._asked]:
                raise self._never_joined(missing)
            self.end_request = f"{self._names(sorted(self._asked))} {END_REQUESTED}."
        if self.end_request is not None and seconds > REQUEST_SECONDS:
            raise FleetFailedError(self.end_request)

    def _best_reason(self) -> FleetFailedError:
        for failure in self._own_errors():
            is_mistake = not failure.traceback  # of the user
            return FleetFailedError(failure.reason, refused=True) if is_mistake else self._failed(failure)
        reported = {failure.rank for failure in self._failures}
        for rank, status in self._ended.items():
            if rank not in reported:
                return FleetFailedError(f"{self._name(rank)} {describe_end(status)}.")
        silent = self._silent(set(self._infos) - set(self._ended) - reported, SILENT_SECONDS)
        if silent:
            return self._silence(silent)
        missing = [rank for rank in self._missing() if rank not in self._ended]
        return self._never_joined(missing) if missing else self._failed(self._failures[0])

    def _never_joined(self, ranks: list[int]) -> FleetFailedError:
        return FleetFailedError(f"{self._names(ranks)} ended before the fleet was up, or never started.")

    def _own_errors(self) -> list[Failure]:
        return [failure for failure in self._failures if not failure.is_consequence]

    def _failed(self, failure: Failure) -> FleetFailedError:
        return FleetFailedError(f"{self._name(failure.rank)} failed: {failure.reason}")

    def _silence(self, ranks: list[int]) -> FleetFailedError:
        seconds = self._clock() - min(self._last_sign[rank] for rank in ranks)
        return FleetFailedError(f"{self._names(ranks)} has not answered for {seconds:.1f} s: {_WHY_SILENT}.")

    def _late(self, step: int) -> FleetFailedError:
        """The error for a step that does not end. Silent ranks are a likelier cause than ranks that wait for them."""
        silent = self._silent(self._infos, SILENT_SECONDS)
        if silent:
            return self._silence(silent)
        late = [rank for rank, done in self._last_step.items() if done < step and rank in self._infos]
        names = self._names(late or list(self._infos))
        return FleetFailedError(f"{names} did not finish step {step} within --step-timeout ({self._timeout:g} s).")

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
