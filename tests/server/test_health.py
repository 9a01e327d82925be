"""Health follows the progress of the engine, and is never wrong while the engine is merely busy."""

import asyncio
import logging

import pytest

from hetis.core.messages import EngineStatus
from hetis.frontend.errors import EngineDeadError
from hetis.server import health
from hetis.server.health import HealthMonitor, Progress
from tests.server.quiet_engine import QuietEngine, frame, http_client

SILENT = "rank 1 (attention worker on cpu) has sent no heartbeat for 3.1 s; last step 17"


def busy(step: int, silent: tuple[str, ...] = ()) -> EngineStatus:
    return EngineStatus(step=step, num_running=3, silent=[*silent])


def test_steps_keep_the_engine_healthy() -> None:
    progress = Progress(30, 0)
    for second in range(1000):
        progress.update(busy(second // 29), second)
        assert progress.problem(second) is None


def test_requests_without_steps_are_a_problem_after_the_timeout_and_until_a_step_ends() -> None:
    progress = Progress(30, 0)
    for second in range(31):
        progress.update(busy(5), second)
    assert progress.problem(30) is None
    progress.update(busy(5), 31)
    assert progress.problem(31) == "requests are running, but no step has ended"
    progress.update(busy(6), 32)
    assert progress.problem(32) is None


def test_an_idle_engine_needs_no_steps() -> None:
    progress = Progress(30, 0)
    for second in range(100):
        progress.update(EngineStatus(step=5), second)
    progress.update(busy(5), 100)
    assert progress.problem(129) is None


def test_waiting_requests_need_steps_too() -> None:
    progress = Progress(30, 0)
    for second in range(40):
        progress.update(EngineStatus(step=5, num_waiting=1), second)
    assert progress.problem(40) is not None


def test_a_driver_that_does_not_answer_is_a_problem_after_the_timeout() -> None:
    progress = Progress(30, 0)
    progress.update(busy(5), 10)
    assert progress.problem(40) is None
    assert progress.problem(41) == "the driver does not answer"


def test_a_silent_rank_is_reported_once_and_is_a_problem_after_the_timeout() -> None:
    progress = Progress(30, 0)
    assert progress.update(busy(1, (SILENT,)), 1) == [SILENT]
    for second in range(2, 30):
        later = SILENT.replace("3.1", str(second))
        assert progress.update(busy(second, (later,)), second) == []
        assert (progress.problem(second) is not None) == (second > 29), "it has been silent for 2 s when it is reported"
    assert progress.update(busy(30, (SILENT,)), 30) == []
    assert progress.problem(30) == "rank 1 (attention worker on cpu) is silent"
    assert progress.update(busy(31), 31) == []
    assert progress.problem(31) is None
    assert progress.update(busy(32, (SILENT,)), 32) == [SILENT], "a new silence"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_one_question_waits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "POLL_SECONDS", 0.001)
    engine, clock = QuietEngine(), Clock()

    async def check() -> None:
        answer: asyncio.Future[EngineStatus] = asyncio.get_running_loop().create_future()
        engine.answer = lambda: answer
        monitor = HealthMonitor(engine, 30, clock)  # type: ignore[arg-type]
        for now in range(32):
            clock.now = now
            await monitor.poll()
        assert engine.num_asked == 1
        assert monitor.problem == "the driver does not answer"
        answer.set_result(busy(3))
        await monitor.poll()
        assert (monitor.problem, monitor.status) == (None, busy(3))

    asyncio.run(check())


def test_the_monitor_logs_silent_ranks_at_once_and_ends_with_the_fleet(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "POLL_SECONDS", 0.001)
    engine = QuietEngine()

    async def answer() -> EngineStatus:
        if engine.num_asked == 2:
            engine.dead_reason = "rank 1 was killed"
            raise EngineDeadError(engine.dead_reason)
        return busy(1, (SILENT,))

    engine.answer = answer
    with caplog.at_level(logging.INFO, "hetis"):
        logging.getLogger("hetis").propagate = True
        asyncio.run(asyncio.wait_for(HealthMonitor(engine, 30).run(), 30))  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == [f"{SILENT}."]


@pytest.mark.parametrize(
    ("ready", "dead", "problem", "status"),
    [
        (True, None, None, (200, "healthy")),
        (True, None, "a rank is silent", (503, "unhealthy")),
        (False, None, None, (503, "starting")),
        (True, "rank 1 was killed", None, (503, "dead")),
    ],
)
def test_the_route_shows_the_last_snapshot(
    ready: bool, dead: str | None, problem: str | None, status: tuple[int, str]
) -> None:
    engine, app, server = frame()
    engine.is_ready, engine.dead_reason, server.health.problem = ready, dead, problem

    async def check() -> None:
        async with http_client(app) as client:
            for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
                found = await client.request(method, path)
                assert (found.status_code, found.json()["status"]) == status
                assert found.json().get("reason") == problem
            assert (await client.head("/health")).status_code == status[0]
            assert (await client.get("/livez")).status_code == 200
        assert engine.num_asked == 0, "a probe costs the driver nothing"

    asyncio.run(check())


def test_a_server_that_drains_is_healthy() -> None:
    _, app, server = frame()
    server.is_draining = True

    async def check() -> int:
        async with http_client(app) as client:
            return (await client.get("/health")).status_code

    assert asyncio.run(check()) == 200
