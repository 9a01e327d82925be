"""A real fleet as metrics, feed and snapshot show it: sums agree with each other and with what clients were given."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from hetis import AsyncLLM, SamplingParams
from hetis.core.messages import EngineStatus, FleetSnapshot, FleetSnapshotQuery, StatusQuery
from hetis.server.app import build_app
from hetis.server.options import ServerOptions
from tests.processes.look import DEADLINE
from tests.server.stand_in import http_client

LONG = SamplingParams(max_tokens=2000, ignore_eos=True, temperature=0)
PROMPT = [1 + index % 50 for index in range(40)]
T = TypeVar("T")


class Served(NamedTuple):
    runner: asyncio.Runner
    llm: AsyncLLM
    app: FastAPI

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(coroutine, DEADLINE))

    async def ask(self, until: Callable[[FleetSnapshot], bool] = lambda _: True) -> FleetSnapshot:
        """The first snapshot that is as wanted; asking also has the driver ask the ranks, once a second."""
        while not until(snapshot := await self.llm.ask(FleetSnapshotQuery(max_sequences=64), FleetSnapshot)):
            await asyncio.sleep(0.01)  # else the driver does nothing but answer
        return snapshot

    async def scrape(self) -> dict[str, dict[str, float]]:
        """Values by name of the sample and rank."""
        async with http_client(self.app) as client:
            text = (await client.get("/metrics")).text
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                ranks = found.setdefault(sample.name.removeprefix("hetis:"), {})
                rank = sample.labels.get("rank", "")
                ranks[rank] = ranks.get(rank, 0.0) + sample.value
        return found

    @asynccontextmanager
    async def running(self, count: int) -> AsyncIterator[None]:
        """So many sequences run, each with some tokens."""
        streams = [self.llm.stream(self.llm.make_request(PROMPT, LONG)) for _ in range(count)]
        try:
            for stream in streams:
                await anext(stream)
            yield
        finally:
            for stream in streams:
                await stream.aclose()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with asyncio.Runner() as runner:
        llm = AsyncLLM(plan="1+2", device="cpu", dtype="float32", kv_cache_memory="64MiB", dispatch="even")
        try:
            runner.run(llm.wait_until_ready())
            yield Served(runner, llm, build_app(llm, ServerOptions()))
        finally:
            llm.close()


def test_during_start_up_the_driver_answers_at_once() -> None:
    """Before the fleet is up: the ranks are still loading."""

    async def run() -> None:
        llm = AsyncLLM(plan="1+0", device="cpu", dtype="float32", kv_cache_memory="64MiB")
        try:
            status = await llm.ask(StatusQuery(), EngineStatus)
            snapshot = await llm.ask(FleetSnapshotQuery(), FleetSnapshot)
            assert not llm.is_ready
            assert (status.step, status.num_running) == (0, 0)
            assert (snapshot.sequences, snapshot.events) == ([], [])
        finally:
            await asyncio.to_thread(llm.close)

    asyncio.run(asyncio.wait_for(run(), DEADLINE))


def test_placements_heads_and_pages_agree(served: Served) -> None:
    async def run() -> None:
        async with served.running(3):
            snapshot = await served.ask(lambda seen: len(seen.sequences) == 3)
            placed = Counter(chain.from_iterable(chain.from_iterable(each.owners for each in snapshot.sequences)))
            assert set(placed) == {0, 1, 2}, "placed evenly over all ranks"
            assert {each.num_tokens > len(PROMPT) for each in snapshot.sequences} == {True}
            queries = snapshot.devices[0].heads // placed[0]
            assert [device.heads for device in snapshot.devices] == [placed[rank] * queries for rank in (0, 1, 2)]
            used = sum(device.pages_used for device in snapshot.devices)
            total = sum(device.pages_total for device in snapshot.devices)
            assert snapshot.status.kv_usage == pytest.approx(used / total)
            assert snapshot.status.num_running == 3
            assert all(len(row) == snapshot.num_groups for each in snapshot.sequences for row in each.owners)
            dispatched = [event for event in snapshot.events if event.kind == "dispatch"][-3:]
            assert [event.sequence_id for event in dispatched] == [each.id for each in snapshot.sequences]
        idle = await served.ask(lambda seen: not seen.status.num_running)
        assert [(device.heads, device.pages_used) for device in idle.devices] == [(0, 0)] * 3

    served.run(run())


def test_counters_are_those_of_the_ranks(served: Served) -> None:
    async def run() -> None:
        async with served.running(1):
            pass
        idle = await served.ask(lambda seen: not seen.status.num_running)
        first = await served.ask(lambda seen: seen.links_clock is not None and seen.links_clock > idle.clock)
        stats = await served.llm.fleet_stats()
        snapshot = await served.ask(lambda seen: seen.links_clock is not None and seen.links_clock > first.clock)
        sent = {(link.source, link.target): link.num_bytes for link in snapshot.links}
        assert sent == {
            tuple(map(int, name.split("->"))): count
            for each in stats.members
            for name, count in each.bytes_sent.items()
        }
        assert all(sent.values())
        for device, member in zip(snapshot.devices, stats.members, strict=True):
            assert device.attention_seconds == pytest.approx(member.attention_seconds)
            assert 0 < device.attention_seconds <= device.busy_seconds
            assert device.wait_seconds > 0
            assert (device.predicted_us, device.measured_us) == (member.predicted_us, member.measured_us)
        assert snapshot.status.step == stats.num_steps
        assert sum(snapshot.counters.step_tokens) == stats.num_steps

    served.run(run())


def test_metrics_are_filled_and_agree_with_the_answer(served: Served) -> None:
    async def run() -> None:
        before = await served.scrape()
        async with http_client(served.app) as client:
            body = {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True}
            usage = (await client.post("/v1/completions", json=body)).json()["usage"]
        await served.ask(lambda seen: seen.links_clock is not None and not seen.status.num_running)
        await asyncio.sleep(0.5)  # the age up to which a scrape uses the snapshot of another one
        after = await served.scrape()
        for name, count in (
            ("prompt_tokens_total", usage["prompt_tokens"]),
            ("generation_tokens_total", usage["completion_tokens"]),
            ("request_success_total", 1),
            ("request_queue_time_seconds_count", 1),
            ("request_prefill_time_seconds_count", 1),
            ("inter_token_latency_seconds_count", 4),
            ("dispatches_total", 1),
        ):
            assert after[name][""] - before.get(name, {}).get("", 0) == count, name
        for name in (
            "kv_pages",
            "busy_seconds_total",
            "wait_seconds_total",
            "attention_seconds_total",
            "link_bytes_total",
        ):
            assert all(after[f"device_{name}"][rank] > 0 for rank in "012"), name
        assert after["http_requests_total"][""] >= 2

    served.run(run())


def test_the_feed_shows_the_fleet_at_work(served: Served) -> None:
    async def run() -> None:
        async with served.running(2), aclosing(served.app.state.server.feed.watch()) as watcher:
            for _ in range(3):
                message = json.loads((await anext(watcher)).removeprefix(b"data: "))
        assert message["state"] == "ready"
        assert message["requests"]["running"] == len(message["sequences"]) == 2
        assert (message["stages"], message["groups"]) == (1, len(message["sequences"][0]["owners"][0]))
        assert all(0 < device["busy"] <= 1 for device in message["devices"])
        assert all(device["pages_used"] > 0 for device in message["devices"])
        assert message["step"] > 0

    served.run(run())


def test_outputs_carry_the_status_and_first_tokens_their_waiting(served: Served) -> None:
    async def run() -> None:
        request = served.llm.make_request(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True))
        async with aclosing(served.llm.stream(request)) as pieces:
            async for _ in pieces:
                assert request.queued_s is not None
                assert request.queued_s >= 0
                assert request.prefill_s is not None
                assert request.prefill_s > 0
        assert served.llm.status is not None
        assert served.llm.status.step > 0

    served.run(run())
