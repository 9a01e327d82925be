"""Who died, and of what: heartbeats, process ends and last words of the ranks, condensed into one verdict.

When one rank dies its neighbours fail too, moments later or moments earlier. So a first sign opens a short time of grace
in which better explanations may come in: a rank's own error first, then a process that ended, then a lost connection.
"""

import time
from collections.abc import Mapping

from hetis.comm import supervision
from hetis.core.fleet import DeviceInfo
from hetis.core.messages import Failure
from hetis.core.plan import Plan

GRACE_SECONDS = 1.0
JOIN_SECONDS = 300.0


class FleetFailed(Exception):
    """The verdict. `culprits`: pids to kill by host, for a process that is stopped cannot end itself."""

    def __init__(self, reason: str, culprits: Mapping[str, list[int]]) -> None:
        super().__init__(reason)
        self.culprits = dict(culprits)


class Watch:
    """Signs of life of one fleet."""

    def __init__(self, plan: Plan, step_timeout: float) -> None:
        self.plan, self._timeout = plan, step_timeout
        self._begin = time.monotonic()
        self._infos: dict[int, DeviceInfo] = {}
        self.pid_fds: dict[int, int] = {}  # descriptor -> rank
        self._last_sign: dict[int, float] = {}
        self._last_step: dict[int, int] = {}
        self._failures: list[Failure] = []
        self._ended: dict[int, str] = {}  # rank -> how its process ended
        self._first_sign: float | None = None
        self._started: dict[int, float] = {}  # step in flight -> since

    def on_hello(self, info: DeviceInfo) -> int | None:
        """Returns a descriptor that becomes readable when the rank's process ends, if it runs on this host."""
        self._infos[info.rank] = info
        self._last_sign[info.rank] = time.monotonic()
        if info.host != supervision.host_id():
            return None
        fd = supervision.open_pidfd(info.pid)
        if fd is not None:
            self.pid_fds[fd] = info.rank
        return fd

    def on_heartbeat(self, rank: int, step: int) -> None:
        self._last_sign[rank], self._last_step[rank] = time.monotonic(), step

    def on_step(self, step: int) -> None:
        self._started[step] = time.monotonic()

    def on_result(self, step: int) -> None:
        self._started.pop(step, None)

    def on_failure(self, failure: Failure) -> None:
        self._failures.append(failure)
        self._note()

    def on_death(self, fd: int) -> None:
        rank = self.pid_fds.pop(fd)
        self._ended[rank] = supervision.end_of(self._infos[rank].pid)
        self._note()

    def on_parent_death(self) -> None:
        """Rank 0, which started the driver, is gone."""
        self._ended.setdefault(0, supervision.end_of(self._infos[0].pid) if 0 in self._infos else "ended early")
        self._note()

    def _note(self) -> None:
        if self._first_sign is None:
            self._first_sign = time.monotonic()

    def check(self) -> None:
        """FleetFailed when the fleet cannot go on."""
        now = time.monotonic()
        if self._first_sign is not None:
            sure = any(not failure.is_consequence for failure in self._failures)
            if sure or now - self._first_sign > GRACE_SECONDS:
                self._condemn()
            return
        silent = [rank for rank, last in self._last_sign.items() if now - last > self._timeout]
        if silent:
            self._condemn_stuck(silent, f"gave no sign of life for {self._timeout:g} s (stopped, or its host is gone)")
        if self._started and now - min(self._started.values()) > self._timeout:
            step = min(self._started)
            late = [rank for rank, done in self._last_step.items() if done < step] or list(self._infos)
            self._condemn_stuck(late, f"did not finish step {step} within {self._timeout:g} s")
        missing = [member.rank for member in self.plan.members() if member.rank not in self._infos]
        if missing and now - self._begin > JOIN_SECONDS:
            raise FleetFailed(f"ranks {missing} did not join within {JOIN_SECONDS:.0f} s.", {})

    def _condemn(self) -> None:
        """The best explanation of what was seen."""
        for failure in sorted(self._failures, key=lambda f: f.is_consequence):
            if not failure.is_consequence:
                raise FleetFailed(f"{self._name(failure.rank)} failed: {failure.reason}", {})
        for rank, how in self._ended.items():
            if not any(failure.rank == rank for failure in self._failures):
                raise FleetFailed(f"{self._name(rank)} {how}.", {})
        failure = self._failures[0]
        raise FleetFailed(f"{self._name(failure.rank)} failed: {failure.reason}", {})

    def _condemn_stuck(self, ranks: list[int], what: str) -> None:
        culprits: dict[str, list[int]] = {}
        for rank in ranks:
            culprits.setdefault(self._infos[rank].host, []).append(self._infos[rank].pid)
        raise FleetFailed(f"{', '.join(self._name(rank) for rank in ranks)} {what}.", culprits)

    def _name(self, rank: int) -> str:
        device = self._infos[rank].device if rank in self._infos else self.plan.device_of(rank)
        return f"rank {rank} ({self.plan.role_of(rank)} on {device})"
