"""One failure reason from many signs, on a clock of the test."""

import pytest

from hetis.core.device_info import DeviceInfo
from hetis.core.messages import Failure
from hetis.core.plan import AttentionWorker, Plan, Primary, Stage
from hetis.driver.watch import (
    GRACE_SECONDS,
    JOIN_SECONDS,
    REQUEST_GRACE_SECONDS,
    REQUEST_SECONDS,
    SILENT_SECONDS,
    FleetFailedError,
    Watch,
)
from hetis.processes.failure import FailureReason

TIMEOUT = 10.0
PRIMARY = Primary(rank=0, device="cpu", groups=(0, 1), mlp_columns=(0, 1), vocab_rows=(0, 1))
PLAN = Plan(
    stages=(Stage(layers=(0, 1), primaries=(PRIMARY,)),),
    workers=(AttentionWorker(rank=1, device="cpu"), AttentionWorker(rank=2, device="cpu")),
)


class Fleet:
    """A watch and its clock."""

    def __init__(self, joined: tuple[int, ...] = (0, 1, 2)) -> None:
        self.now = 100.0
        self.watch = Watch(PLAN, TIMEOUT, clock=lambda: self.now)
        for rank in joined:
            self.join(rank)

    def join(self, rank: int) -> None:
        info = DeviceInfo(
            rank=rank, device="cuda:3", name="", host="", address="", pid=1000 + rank, num_threads=1,
            total_memory=1, free_memory=1,
        )  # fmt: skip
        self.watch.on_hello(info)

    def beat(self, *ranks: int, step: int = 0) -> None:
        for rank in ranks:
            self.watch.on_heartbeat(rank, step)

    def fail(self, rank: int, reason: str, traceback: str = "", is_consequence: bool = False) -> None:
        self.watch.on_failure(Failure(rank=rank, reason=reason, traceback=traceback, is_consequence=is_consequence))

    def error(self, after: float = GRACE_SECONDS + 0.1) -> FleetFailedError:
        """The error after so many seconds, when there was none before, in the grace period."""
        self.watch.check()
        self.now += after
        with pytest.raises(FleetFailedError) as caught:
            self.watch.check()
        return caught.value


def test_a_healthy_fleet_is_left_alone() -> None:
    fleet = Fleet()
    for step in range(5):
        fleet.now += TIMEOUT * 0.9
        fleet.beat(0, 1, 2, step=step)
        fleet.watch.on_step(step)
        fleet.watch.check()
        fleet.watch.on_result(step)


def test_a_step_that_was_sent_ahead_is_late_only_after_the_one_before_it() -> None:
    fleet = Fleet()
    for step in range(5):
        fleet.watch.on_step(step)
        fleet.watch.on_step(step + 1)
        fleet.now += TIMEOUT * 0.9
        fleet.beat(0, 1, 2, step=step)
        fleet.watch.check()
        fleet.watch.on_result(step)
    fleet.now += TIMEOUT
    fleet.beat(0, 1, 2, step=4)
    assert "did not finish step 5 within --step-timeout (10 s)" in str(fleet.error(0.1))


def test_a_ranks_own_error_is_the_reason_at_once() -> None:
    fleet = Fleet()
    fleet.fail(0, "connection to rank 1 lost", is_consequence=True)
    fleet.watch.check()
    fleet.fail(1, "MemoryError: none left", traceback="Traceback …")
    with pytest.raises(FleetFailedError, match=r"rank 1 \(attention worker on cuda:3\) failed: MemoryError: none left"):
        fleet.watch.check()


def test_an_error_without_a_traceback_is_a_mistake_of_the_user() -> None:
    fleet = Fleet()
    fleet.fail(1, "model.safetensors is cut off; download it again.")
    with pytest.raises(FleetFailedError) as caught:
        fleet.watch.check()
    assert caught.value.reason == FailureReason("model.safetensors is cut off; download it again.", refused=True)


@pytest.mark.parametrize("joined", [(0, 1), (0, 1, 2)])
def test_a_death_explains_lost_connections(joined: tuple[int, ...]) -> None:
    fleet = Fleet(joined)
    fleet.fail(0, "the connection was lost", is_consequence=True)
    fleet.watch.on_end(2, 9)
    device = "cuda:3" if 2 in joined else "cpu"
    assert str(fleet.error()) == (
        f"rank 2 (attention worker on {device}) was killed by SIGKILL, perhaps because memory ran out."
    )


def test_a_request_to_end_is_no_failure_until_the_root_has_not_reacted_for_long() -> None:
    fleet = Fleet()
    fleet.watch.on_request([1, 2])
    fleet.watch.on_request([0])
    for seconds in (REQUEST_GRACE_SECONDS - 0.1, 0.2, REQUEST_SECONDS - REQUEST_GRACE_SECONDS - 0.2):
        assert fleet.watch.end_request is None or seconds > 0.2
        fleet.now += seconds
        fleet.beat(0, 1, 2)
        fleet.watch.check()
    assert fleet.watch.end_request is not None
    assert fleet.watch.end_request.count("rank") == 3
    assert "was asked to end by its launcher" in str(fleet.error(0.2))


def test_a_death_explains_a_request_to_end() -> None:
    fleet = Fleet()
    fleet.watch.on_request([0, 1])
    fleet.watch.on_end(2, 9)
    assert "rank 2 (attention worker on cuda:3) was killed by SIGKILL" in str(fleet.error())


def test_a_rank_that_never_joined_is_suspected_when_the_others_are_asked_to_end() -> None:
    fleet = Fleet((0, 1))
    fleet.watch.on_request([0, 1])
    fleet.now += REQUEST_GRACE_SECONDS
    fleet.beat(0, 1)
    assert "rank 2 (attention worker on cpu) ended before the fleet was up" in str(fleet.error(0.1))


def test_a_silent_rank_is_named() -> None:
    fleet = Fleet()
    fleet.now += TIMEOUT * 0.9
    fleet.beat(0, 2)
    error = fleet.error(TIMEOUT * 0.2)
    assert "rank 1 (attention worker on cuda:3) did not answer within --step-timeout (10 s)" in str(error)


def test_ranks_that_wait_for_a_silent_one_are_not_named() -> None:
    """The step is late before the silence is long enough; so is the report of a peer that waits less."""
    fleet = Fleet()
    fleet.watch.on_step(7)
    fleet.now += 1.0
    fleet.beat(1, step=6)
    fleet.now += TIMEOUT - 1.0
    fleet.beat(0, 2, step=6)
    assert "rank 1 (attention worker on cuda:3) has not answered for 9.1 s" in str(fleet.error(0.1))
    fleet = Fleet()
    fleet.now += SILENT_SECONDS
    fleet.beat(0, 2)
    fleet.fail(0, "rank 1 does not answer", is_consequence=True)
    assert "rank 1 (attention worker on cuda:3) has not answered for 3.1 s" in str(fleet.error())


def test_a_late_step_names_the_ranks_that_are_behind() -> None:
    fleet = Fleet()
    fleet.watch.on_step(7)
    fleet.now += TIMEOUT
    fleet.beat(0, step=7)
    fleet.beat(1, 2, step=6)
    error = str(fleet.error(0.1))
    assert "rank 1" in error
    assert "rank 2" in error
    assert "did not finish step 7 within --step-timeout (10 s)" in error
    assert "rank 0" not in error


def test_ranks_that_never_join_are_named() -> None:
    fleet = Fleet((0,))
    fleet.now += JOIN_SECONDS
    fleet.beat(0)
    assert "rank 1 (attention worker on cpu), rank 2 (attention worker on cpu) did not join" in str(fleet.error(0.1))
