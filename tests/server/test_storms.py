"""A server under fire: fuzzed from its own schema, cancelled at random, and overloaded."""

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes.look import DEADLINE
from tests.server.server_process import ServerProcess, http_client

pytestmark = pytest.mark.process
MAX_QUEUED, BURSTS = 16, 5
REFERENCE = {"prompt": "A list is", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = ("--max-num-seqs", "8", "--max-queued-requests", str(MAX_QUEUED))
    with ServerProcess(tmp_path_factory.mktemp("server"), *options) as process:
        yield process.wait_until_ready()
        assert process.process.poll() is None, process.text()


def run(script: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(script, 4 * DEADLINE))


async def completion(client: httpx.AsyncClient) -> Any:
    return (await client.post("/v1/completions", json=REFERENCE)).json()["choices"][0]["text"]


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """Running and waiting sequences, and the share of KV pages in use."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: samples[f"hetis:{name}"] for name in names}


async def until_idle(client: httpx.AsyncClient) -> None:
    """Waits until no sequence is left, and with it no page."""
    while any((await gauges(client)).values()):
        await asyncio.sleep(0.1)


def test_no_request_of_a_fuzzer_is_an_error_of_the_server(url: str, directory: Path) -> None:
    async def reference() -> None:
        async with http_client(url) as client:
            await until_idle(client)
            texts.append(await completion(client))

    texts: list[Any] = []
    run(reference())
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--mode", "all", "--seed", "1"]
    command += ["--checks", "not_a_server_error,status_code_conformance,content_type_conformance", "--no-shrink"]
    command += ["--max-examples", "60", "--request-timeout", "60", "--continue-on-failure", "--no-color"]
    command += ["--exclude-path", "/fleet/events"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    run(reference())
    assert texts[0] == texts[1], "the server answers as before"


def test_requests_that_are_cut_at_random_leave_nothing(url: str) -> None:
    """Half of 500 requests are cut, queued or running, streaming or not; the others are complete."""
    draw = random.Random(0)

    async def one(client: httpx.AsyncClient, is_cut: bool, stream: bool) -> str:
        body = REFERENCE | {"max_tokens": draw.randrange(1, 40), "ignore_eos": True, "stream": stream}
        seconds = draw.uniform(0.0, 0.4) if is_cut else None
        try:
            answer = await asyncio.wait_for(client.post("/v1/completions", json=body), seconds)
        except TimeoutError:
            return "cut"
        if answer.status_code == 503:
            return "refused"
        assert answer.status_code == 200, answer.text
        assert answer.text.endswith("data: [DONE]\n\n") or json.loads(answer.text)["choices"][0]["finish_reason"]
        return "complete"

    async def script() -> None:
        ends: Counter[str] = Counter()
        async with http_client(url) as client:
            before = await completion(client)
            for _ in range(50):  # with those just cut no more at once than run and wait, so that none is refused
                cuts = [index % 2 == 0 for index in range(10)]
                ends.update(await asyncio.gather(*(one(client, cut, draw.random() < 0.5) for cut in cuts)))
            await until_idle(client)
            assert await completion(client) == before
        assert ends["complete"] >= 250
        assert ends["cut"] + ends["complete"] == 500

    run(script())


def test_an_overloaded_server_refuses_what_it_cannot_queue(url: str) -> None:
    """Ten times what runs and waits, over and over: answers are complete, or 503 with Retry-After."""

    async def one(client: httpx.AsyncClient) -> int:
        answer = await client.post("/v1/completions", json=REFERENCE | {"ignore_eos": True})
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["message"]
        else:
            assert answer.json()["usage"]["completion_tokens"] == REFERENCE["max_tokens"]
        return answer.status_code

    async def watch(client: httpx.AsyncClient, seen: list[float]) -> None:
        while True:
            seen.append((await gauges(client))["num_requests_waiting"])
            await asyncio.sleep(0.05)

    async def script() -> None:
        seen: list[float] = []
        async with http_client(url) as client:
            watcher = asyncio.create_task(watch(client, seen))
            for _ in range(BURSTS):
                statuses = Counter(await asyncio.gather(*(one(client) for _ in range(10 * (8 + MAX_QUEUED)))))
                assert set(statuses) == {200, 503}
                assert statuses[200] >= 8 + MAX_QUEUED, "all that run and wait are served"
            watcher.cancel()
            await until_idle(client)
        assert max(seen) <= MAX_QUEUED

    run(script())
