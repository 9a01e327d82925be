"""The feed: exact JSON, one question for all watchers, no work without them, an end when the server drains."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from hetis.core.messages import FleetCounters, FleetSnapshot
from hetis.server import feed as module
from hetis.server.errors import ApiError, add_error_handlers
from hetis.server.feed import MAX_BEHIND, MAX_WATCHERS, Feed, router
from hetis.server.feed_message import MessageMaker, percentiles_ms
from hetis.server.metrics import Metrics
from hetis.server.sampler import MAX_EVENTS, FleetSampler, shown_id
from tests.server.watched_engine import FakePiece, FakeRequest, WatchedEngine, event, make_snapshot

FOREVER = 1e6  # seconds: a period in which one message comes


class Parts:
    """A feed over a stand-in of the engine, whose state the test sets."""

    def __init__(self, engine: WatchedEngine | None = None) -> None:
        self.engine, self.state = engine or WatchedEngine(), "ready"
        self.sampler = FleetSampler(self.engine)  # type: ignore[arg-type]
        self.metrics = Metrics(self.sampler, "tiny")
        self.feed = Feed(self.sampler, self.metrics, "tiny", lambda: self.state)


@pytest.fixture
def period(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the seconds between two messages."""
    return lambda seconds: monkeypatch.setattr(module, "PERIOD_SECONDS", seconds)


def run(test: Callable[[Parts], Awaitable[None]], engine: WatchedEngine | None = None) -> None:
    async def whole() -> None:
        await test(Parts(engine))

    asyncio.run(whole())


async def take(watcher: AsyncGenerator[bytes, None]) -> dict[str, Any]:
    frame = await anext(watcher)
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    message = json.loads(frame[6:])
    assert isinstance(message, dict)
    return message


# --- the message ------------------------------------------------------------------------------------------------------


def test_the_first_message_has_all_that_is_known(period: Callable[[float], None]) -> None:
    period(FOREVER)

    async def test(parts: Parts) -> None:
        parts.engine.snapshot = make_snapshot(events=[event(1), event(2, kind="migration", sequence_id="", clock=99.0)])
        async with aclosing(parts.feed.watch()) as watcher:
            message = await take(watcher)
        now = message.pop("time")
        first, second = message.pop("events")
        assert (first["kind"], first["text"]) == ("dispatch", "cmpl-1: event 1")
        assert (second["kind"], second["text"]) == ("migration", "event 2")
        assert first["time"] - second["time"] == pytest.approx(1.0, abs=1e-3)
        assert first["time"] == pytest.approx(now, abs=60.0), "the driver's clock said that it happened just now"
        assert message.pop("uptime_s") >= 0
        silent = [device.pop("silent_s") for device in message["devices"]]
        assert all(seconds >= 0.1 for seconds in silent), "at least what the driver says"
        device = {"device": "cpu", "name": "CPU", "pages_total": 40, "heads": 8, "busy": 0.0}
        device |= {"predicted_us": 100.0, "measured_us": 120.0}
        assert message == {
            "model": "tiny",
            "step": 7,
            "state": "ready",
            "requests": {"running": 2, "waiting": 1, "finished": 0, "failed": 0, "preemptions": 3},
            "throughput": {"prompt_tokens_per_s": 0.0, "output_tokens_per_s": 0.0},
            "latency": {"ttft_p50_ms": None, "ttft_p95_ms": None, "tpot_p50_ms": None, "tpot_p95_ms": None},
            "devices": [
                device | {"rank": 0, "role": "primary", "pages_used": 10},
                device | {"rank": 1, "role": "attention worker", "pages_used": 11},
            ],
            "links": [
                {"source": 0, "target": 1, "bytes_per_s": 0.0},
                {"source": 1, "target": 0, "bytes_per_s": 0.0},
            ],
            "stages": 1,
            "groups": 2,
            "sequences": [
                {"id": "cmpl-1", "tokens": 12, "state": "prefill", "owners": [[0, 1]]},
                {"id": "cmpl-1/1", "tokens": 13, "state": "decode", "owners": [[1, 1]]},
            ],
        }

    run(test)


def messages_of(*snapshots: FleetSnapshot) -> list[Any]:
    """A message after each snapshot."""

    async def whole() -> list[Any]:
        parts = Parts()
        maker = MessageMaker(parts.sampler, parts.metrics, "tiny")
        found = []
        for snapshot in snapshots:
            parts.engine.snapshot = snapshot
            await parts.sampler.refresh(max_age=-1.0)
            found.append(maker.make("ready", ()))
        return found

    return asyncio.run(whole())


def test_rates_of_devices_and_links_are_between_two_snapshots() -> None:
    _, message = messages_of(make_snapshot(0.0), make_snapshot(4.0))
    assert [device.busy for device in message.devices] == [0.5, 0.5]
    assert [(link.source, link.target, link.bytes_per_s) for link in message.links] == [(0, 1, 1000.0), (1, 0, 500.0)]


def test_rates_of_links_stay_until_the_ranks_have_been_asked_again() -> None:
    old = make_snapshot(4.0)
    same = make_snapshot(5.0, links=old.links, links_clock=old.links_clock)
    *_, message = messages_of(make_snapshot(0.0), old, same)
    assert [link.bytes_per_s for link in message.links] == [1000.0, 500.0]


def test_a_worker_whose_stages_run_at_the_same_time_is_busy_at_most() -> None:
    end = make_snapshot(1.0)
    end.devices[1].busy_seconds = 3.0
    _, message = messages_of(make_snapshot(0.0), end)
    assert [device.busy for device in message.devices] == [0.5, 1.0]


def test_a_fleet_that_starts_has_no_devices() -> None:
    starting = make_snapshot(devices=[], links=[], links_clock=None, sequences=[], num_stages=0, num_groups=0)
    starting.counters = FleetCounters()
    (message,) = messages_of(starting)
    assert (message.devices, message.links, message.sequences) == ([], [], [])


def test_throughput_and_latency_are_those_of_this_server(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    maker = MessageMaker(parts.sampler, parts.metrics, "tiny")
    meter = parts.metrics.begin(FakeRequest(), "/v1/completions")  # type: ignore[arg-type]
    for _ in range(3):
        meter.on_piece(FakePiece())  # type: ignore[arg-type]
    meter.finish("stop")
    message = maker.make("ready", ())
    assert message.throughput.output_tokens_per_s / message.throughput.prompt_tokens_per_s == pytest.approx(3 / 10)
    assert message.requests.finished == 1
    assert message.latency.ttft_p50_ms is not None
    assert message.latency.tpot_p95_ms is not None
    assert maker.make("ready", ()).throughput.output_tokens_per_s == 0.0


def test_ids_are_those_that_clients_know() -> None:
    cases = {"cmpl-1#7/0": "cmpl-1", "cmpl-1#7/2": "cmpl-1/2", "a#b#7/0": "a#b", "a/b#7/0": "a/b", "7/0": "7", "": ""}
    assert {name: shown_id(name) for name in cases} == cases


def test_percentiles() -> None:
    assert percentiles_ms([]) == (None, None)
    assert percentiles_ms([0.25]) == (250.0, 250.0)
    assert percentiles_ms([number / 1000 for number in range(101)]) == pytest.approx((50.0, 95.0))


# --- watchers ---------------------------------------------------------------------------------------------------------


def test_all_watchers_share_one_question_and_nothing_runs_without_them(period: Callable[[float], None]) -> None:
    period(FOREVER)

    async def test(parts: Parts) -> None:
        watchers = [parts.feed.watch() for _ in range(MAX_WATCHERS)]
        assert parts.engine.queries == [], "a watcher that has not begun costs nothing"
        messages = [await take(watcher) for watcher in watchers]
        assert len(parts.engine.queries) == 1
        assert all(message["devices"] == messages[0]["devices"] for message in messages)
        with pytest.raises(ApiError) as refused:
            parts.feed.watch()
        assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "10"})
        period(0.0)
        for watcher in watchers:
            await watcher.aclose()
        assert parts.feed.num_watchers == 0
        num_queries = len(parts.engine.queries)
        for _ in range(20):  # turns of the loop, in which a task without a period would ask
            await asyncio.sleep(0)
        assert len(parts.engine.queries) == num_queries

    run(test)


def test_events_come_once_to_each_watcher(period: Callable[[float], None]) -> None:
    """A later watcher gets the recent ones at once."""
    period(0.0)

    async def test(parts: Parts) -> None:
        parts.engine.snapshot = make_snapshot(events=[event(number) for number in range(1, MAX_EVENTS + 10)])
        async with aclosing(parts.feed.watch()) as one:
            assert len((await take(one))["events"]) == MAX_EVENTS
            parts.engine.snapshot = make_snapshot(events=[event(MAX_EVENTS + 10)])
            while not (found := (await take(one))["events"]):
                pass
            assert [each["text"] for each in found] == [f"cmpl-1: event {MAX_EVENTS + 10}"]
            assert parts.engine.queries[-1].after_event >= MAX_EVENTS + 9
            async with aclosing(parts.feed.watch()) as other:
                texts = [each["text"] for each in (await take(other))["events"]]
                assert len(texts) == MAX_EVENTS
                assert texts[-1] == f"cmpl-1: event {MAX_EVENTS + 10}"

    run(test)


def test_a_slow_watcher_misses_old_messages_and_delays_none(period: Callable[[float], None]) -> None:
    period(0.0)

    async def test(parts: Parts) -> None:
        async with aclosing(parts.feed.watch()) as slow, aclosing(parts.feed.watch()) as fast:
            before = await take(slow)
            for _ in range(3 * MAX_BEHIND):
                latest = await take(fast)
            waiting = [await take(slow) for _ in range(MAX_BEHIND)]
            assert before["time"] < waiting[0]["time"]
            assert waiting[-1]["time"] >= latest["time"]

    run(test)


def test_a_silent_driver_and_a_dead_fleet_are_shown(
    period: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    period(0.0)
    monkeypatch.setattr(FleetSampler.refresh, "__defaults__", (0.01,))

    async def test(parts: Parts) -> None:
        async with aclosing(parts.feed.watch()) as watcher:
            first = await take(watcher)
            parts.engine.answers.clear()
            while (later := await take(watcher))["devices"][0]["silent_s"] <= first["devices"][0]["silent_s"]:
                pass
            assert later["step"] == first["step"]
            parts.engine.is_dead, parts.state = True, "dead"
            parts.engine.answers.set()
            while (last := await take(watcher))["state"] != "dead":
                pass
            assert len(last["devices"]) == 2, "what was known"

    run(test)


def test_streams_end_when_the_server_drains(period: Callable[[float], None]) -> None:
    period(FOREVER)

    async def test(parts: Parts) -> None:
        watchers = [parts.feed.watch() for _ in range(2)]
        for watcher in watchers:
            await take(watcher)
        parts.state = "draining"
        parts.feed.close()
        for watcher in watchers:
            assert (await take(watcher))["state"] == "draining"
            assert [frame async for frame in watcher] == []
        assert parts.feed.num_watchers == 0
        with pytest.raises(ApiError):
            parts.feed.watch()

    run(test)


def test_the_route_serves_events(period: Callable[[float], None]) -> None:
    period(0.0)

    async def test(parts: Parts) -> None:
        app = FastAPI()
        app.include_router(router)
        add_error_handlers(app)
        app.state.server = SimpleNamespace(feed=parts.feed)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            asked = asyncio.create_task(client.get("/fleet/events"))  # this transport collects the whole body
            while not parts.engine.queries:
                await asyncio.sleep(0)
            parts.feed.close()
            response = await asked
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-store"
            frames = response.text.split("\n\n")[:-1]
            assert frames
            assert all(json.loads(frame.removeprefix("data: "))["model"] == "tiny" for frame in frames)
            refused = await client.get("/fleet/events")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")

    run(test)
