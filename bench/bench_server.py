"""What the HTTP server costs: per streamed chunk, beside `LLM.generate`, idle, watched, and under too many requests.

    python bench/bench_server.py                       # all, with their aims
    python bench/bench_server.py chunk idle

chunk        64 streams of the small model: CPU time of the root process per streamed token (aim: 60 us)
throughput   16 streams of 256/64 tokens, Qwen3-0.6B's shape, over HTTP and by LLM.generate in turn (aim: 0.97)
idle         CPU time of all processes without requests (aim: 2 % of a core)
watched      16 streams with and without a reader of /fleet/events in turn (aim: 0.99)
overload     completions/s under ten times the requests/s that the server can complete, for 60 s, beside those of as
             many clients as it serves at once (aim: 0.9); all else is 503, and the queue keeps its bound

Prints a line for each round, the medians, and exits with 1 if an aim is missed.
"""

import argparse
import asyncio
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from extras import need

need("httpx", "psutil")
import httpx  # noqa: E402
import psutil  # noqa: E402
from bench_peers import MAX_LEN, hetis_options  # noqa: E402
from checkpoint import make_checkpoint  # noqa: E402
from storm import Storm  # noqa: E402

SMALL = ("--device", "cpu", "--kv-cache-memory", "256MiB", "--max-num-seqs", "64")
STREAMS, TOKENS = 64, 200
NUM_PROMPTS, INPUT_LEN, OUTPUT_LEN = 16, 256, 64
IDLE_SECONDS = 20.0
START_SECONDS = 120.0
SERVED, QUEUED, OVERLOAD_SECONDS = 8, 16, 60.0


class Aim(NamedTuple):
    value: float
    is_most: bool  # else it is the least

    def holds(self, found: float) -> bool:
        return found <= self.value if self.is_most else found >= self.value


class Served(NamedTuple):
    url: str
    root: psutil.Process

    def cpu_seconds(self, *, all_processes: bool) -> float:
        members = [self.root, *(self.root.children(recursive=True) if all_processes else ())]
        return sum(sum(process.cpu_times()[:2]) for process in members)


def free_port() -> int:
    """A port of the loopback interface that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(command: list[str], health: str, seconds: float, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a server, which must answer at the address `health` within `seconds`; ends it afterwards.

    `options`: those of Popen.
    """
    process, deadline = subprocess.Popen(command, **options), time.monotonic() + seconds
    try:
        while not answers(health):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def server(*arguments: str) -> Iterator[Served]:
    port = free_port()
    command = [sys.executable, "-m", "hetis", "serve", *arguments, "--port", str(port), "--log-level", "warning"]
    url = f"http://127.0.0.1:{port}"
    with started(command, f"{url}/readyz", START_SECONDS) as process:
        yield Served(url, psutil.Process(process.pid))


async def stream(client: httpx.AsyncClient, prompt: list[int], num_tokens: int) -> int:
    """Number of events of one streamed completion."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        return sum([line.startswith("data: {") async for line in answer.aiter_lines()])


async def stream_all(url: str, prompts: list[list[int]], num_tokens: int) -> tuple[float, int]:
    """(seconds, events) of all prompts at once."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        begin = time.perf_counter()
        events = await asyncio.gather(*(stream(client, prompt, num_tokens) for prompt in prompts))
        return time.perf_counter() - begin, sum(events)


def prompts_of(count: int, length: int, vocab_size: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(100, vocab_size) for _ in range(length)] for _ in range(count)]


# --- what is measured -------------------------------------------------------------------------------------------------


def chunk(rounds: int) -> list[float]:
    """CPU microseconds of the root process per streamed token."""
    found = []
    with server(*SMALL) as served:
        prompts = prompts_of(STREAMS, 8, 256)
        asyncio.run(stream_all(served.url, prompts, 8))
        for _ in range(rounds):
            before = served.cpu_seconds(all_processes=False)
            _, events = asyncio.run(stream_all(served.url, prompts, TOKENS))
            assert events == STREAMS * TOKENS, f"{events} events"
            found.append(1e6 * (served.cpu_seconds(all_processes=False) - before) / events)
    return found


def idle(rounds: int) -> list[float]:
    """Share of a core that an idle server and its fleet use."""
    found = []
    with server(*SMALL, "--plan", "1+1") as served:
        asyncio.run(stream_all(served.url, prompts_of(2, 8, 256), 8))
        time.sleep(2)
        for _ in range(rounds):
            before = served.cpu_seconds(all_processes=True)
            time.sleep(IDLE_SECONDS)
            found.append((served.cpu_seconds(all_processes=True) - before) / IDLE_SECONDS)
    return found


def throughput(rounds: int) -> list[float]:
    """Tokens/s over HTTP, divided by those of LLM.generate, one after the other in turn."""
    from hetis import LLM, SamplingParams

    prompts = prompts_of(NUM_PROMPTS, INPUT_LEN, 150_000)
    params = SamplingParams(max_tokens=OUTPUT_LEN, temperature=0, ignore_eos=True)

    def by_llm(model: str) -> float:
        with LLM(model, **hetis_options("1+0")) as llm:  # type: ignore[arg-type]
            llm.generate(prompts[:2], SamplingParams(max_tokens=2), use_tqdm=False)
            begin = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return NUM_PROMPTS * OUTPUT_LEN / (time.perf_counter() - begin)

    def by_http(model: str) -> float:
        options = ("--device", "cpu", "--dtype", "bfloat16", "--max-num-seqs", "64", "--max-model-len", str(MAX_LEN))
        with server(model, *options) as served:
            asyncio.run(stream_all(served.url, prompts[:2], 2))
            seconds, _ = asyncio.run(stream_all(served.url, prompts, OUTPUT_LEN))
            return NUM_PROMPTS * OUTPUT_LEN / seconds

    with tempfile.TemporaryDirectory() as scratch:
        return alternate(by_http, by_llm, str(make_checkpoint(Path(scratch))), rounds)


def watched(rounds: int) -> list[float]:
    """Tokens/s while /fleet/events is read, divided by those without a reader, in turn."""

    def measure(url: str) -> float:
        seconds, events = asyncio.run(stream_all(url, prompts_of(16, 8, 256), 4 * TOKENS))
        return events / seconds

    def measure_watched(url: str) -> float:
        with watcher(url):
            return measure(url)

    with server(*SMALL, "--plan", "1+1", "--dispatch", "even") as served:
        measure(served.url)
        return alternate(measure_watched, measure, served.url, rounds)


@contextmanager
def watcher(url: str) -> Iterator[None]:
    """Reads /fleet/events in a process of its own, which is ready when it has read the first event."""
    script = f"import urllib.request\nfor line in urllib.request.urlopen('{url}/fleet/events'): print(flush=True)"
    with subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.terminate()


def overload(rounds: int) -> list[float]:
    """Completions/s under ten times too many requests, divided by the peak."""
    from hetis.bench_serve.http_client import HttpClient
    from hetis.bench_serve.load import LoadGenerator, Prepared

    body = {"prompt": [5] * 32, "max_tokens": 128, "ignore_eos": True, "stream": True}

    def complete(url: str, num_requests: int, concurrency: int) -> float:
        """Completions/s of so many clients, each of which sends its next request when one has ended."""
        client = HttpClient(url)
        requests = [Prepared(client.encode("POST", "/v1/completions", body), 32, 0.0)] * num_requests
        outcome = asyncio.run(LoadGenerator(client, max_concurrency=concurrency, timeout=120).run(requests))
        assert all(answer.failure is None for answer in outcome.answers)
        return num_requests / outcome.duration

    async def overwhelm(url: str, rate: float) -> Counter[str]:
        storm = Storm(url, HttpClient(url).encode("POST", "/v1/completions", body))
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watch_queue(url))
            await storm.run(rate, OVERLOAD_SECONDS)
            watcher.cancel()
        return storm.ends

    found = []
    options = ("--max-num-seqs", str(SERVED), "--max-queued-requests", str(QUEUED))
    with server("--device", "cpu", "--kv-cache-memory", "64MiB", *options) as served:
        complete(served.url, SERVED, SERVED)
        for _ in range(rounds):
            peak = complete(served.url, 25 * SERVED, 2 * SERVED)
            ends = asyncio.run(overwhelm(served.url, 10 * peak))
            assert set(ends) == {"200", "503"}, ends
            print(f"    peak {peak:.1f}/s, then {10 * peak:.0f}/s: {dict(ends)}", flush=True)
            found.append(ends["200"] / OVERLOAD_SECONDS / peak)
    return found


async def watch_queue(url: str) -> None:
    """Asserts twice a second that no more requests wait than may."""
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        while True:
            lines = (await client.get("/metrics")).text.splitlines()
            waiting = next(float(line.split()[-1]) for line in lines if line.startswith("hetis:num_requests_waiting{"))
            assert waiting <= QUEUED, f"{waiting} requests wait"
            await asyncio.sleep(0.5)


def alternate(one: Callable[[str], float], other: Callable[[str], float], argument: str, rounds: int) -> list[float]:
    """Ratios of the first to the second, which begin in turn."""
    found = []
    for index in range(rounds):
        if index % 2 == 0:
            first, second = one(argument), other(argument)
        else:
            second, first = other(argument), one(argument)
        print(f"    {first:.1f} and {second:.1f} tokens/s", flush=True)
        found.append(first / second)
    return found


CASES: dict[str, tuple[Callable[[int], list[float]], str, Aim]] = {
    "chunk": (chunk, "us of CPU per streamed token", Aim(60.0, is_most=True)),
    "idle": (idle, "of a core", Aim(0.02, is_most=True)),
    "watched": (watched, "of the throughput without a watcher", Aim(0.99, is_most=False)),
    "overload": (overload, "of the peak", Aim(0.9, is_most=False)),
    "throughput": (throughput, "of LLM.generate's throughput", Aim(0.97, is_most=False)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[], help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    holds = True
    for name in options.cases or CASES:
        measure, unit, aim = CASES[name]
        found = measure(options.rounds)
        for index, value in enumerate(found):
            print(f"round {index}  {name:12} {value:.4f}", flush=True)
        middle = median(found)
        holds &= aim.holds(middle)
        limit = f"aim: {'at most' if aim.is_most else 'at least'} {aim.value:g}"
        print(f"{name}: median {middle:.4f} ({min(found):.4f} to {max(found):.4f}) {unit} ({limit})", flush=True)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
