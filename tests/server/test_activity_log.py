"""The line about what the server does, on a clock of the test."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress

import pytest

from hetis.core.messages import EngineStatus
from hetis.server import activity_log as module
from hetis.server.activity_log import ActivityLog
from hetis.server.metrics import Metrics
from hetis.server.sampler import FleetSampler
from tests.server.watched_engine import WatchedEngine


class Watched:
    def __init__(self) -> None:
        self.now = 100.0
        self.status: EngineStatus | None = EngineStatus()
        self.metrics = Metrics(FleetSampler(WatchedEngine()), "tiny")  # type: ignore[arg-type]
        self.activity = ActivityLog(self.metrics, lambda: self.status, lambda: self.now)

    def report(self, seconds: float = 10.0) -> None:
        self.now += seconds
        self.activity.report()


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("hetis"), "propagate", True)
    with caplog.at_level(logging.INFO, "hetis"):
        yield caplog


def test_rates_are_those_since_the_last_line(records: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    watched.metrics.prompt_tokens, watched.metrics.output_tokens = 500, 20
    watched.status = EngineStatus(num_running=3, num_waiting=2, kv_usage=0.123)
    watched.report(10.0)
    watched.metrics.output_tokens += 10
    watched.report(4.0)
    assert records.messages == [
        "3 running, 2 waiting; 50.0 tokens/s of prompts, 2.0 of outputs; 12 % of KV pages in use",
        "3 running, 2 waiting; 0.0 tokens/s of prompts, 2.5 of outputs; 12 % of KV pages in use",
    ]
    assert records.records[1].fields == {  # type: ignore[attr-defined]
        "num_running": 3,
        "num_waiting": 2,
        "prompt_tokens_per_second": 0.0,
        "output_tokens_per_second": 2.5,
        "kv_usage": 0.123,
    }


def test_an_idle_server_is_silent(records: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    watched.report()
    watched.metrics.output_tokens = 7
    watched.report()  # all has ended since
    watched.report()
    assert len(records.messages) == 1
    assert records.messages[0].startswith("0 running, 0 waiting; ")


def test_a_fleet_that_waits_without_a_token_is_shown(records: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    watched.status = EngineStatus(num_waiting=1)
    watched.report()
    assert records.messages[0].startswith("0 running, 1 waiting; 0.0 tokens/s")


def test_nothing_is_known_before_the_engine_has_answered(records: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    watched.status = None
    watched.report()
    assert records.messages == []


def test_it_runs_until_it_is_cancelled(records: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERIOD_SECONDS", 0.0)
    watched = Watched()
    watched.status = EngineStatus(num_running=1)

    async def run() -> None:
        task = asyncio.create_task(watched.activity.run())
        while len(records.messages) < 2:
            watched.now += 1.0
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
