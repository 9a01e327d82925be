"""`hetis bench serve` beside guidellm on a server with fixed delays: do they measure the same?

    make install-clients
    python bench/bench_client.py             # both clients, one after the other, at a constant rate and in 8 streams
    python bench/bench_client.py --cost      # CPU time of our client and of httpx for the same streams

The server of tests/bench_serve/stand_in_server.py sends each token at a fixed time after the request's arrival, so that
what the clients should find is known: TTFT 100 ms, TPOT 20 ms, E2EL 100 + 31 * 20 = 720 ms. Every figure of the two
must agree within 2 %; rows go to bench/results/clients.jsonl. guidellm's inter-token latency is vLLM's TPOT, its mean
weighted by tokens: the same for outputs of one length.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent.parent
STAND_IN = HERE / "tests/bench_serve/stand_in_server.py"
GUIDELLM = HERE / ".venv-clients/guidellm/bin/guidellm"
TOKENIZER = next((HERE / "hetis/assets").rglob("tokenizer.json")).parent
TTFT_MS, ITL_MS, INPUT_LEN, OUTPUT_LEN = 100.0, 20.0, 64, 32
TOLERANCE = 0.02
Figures = dict[str, float]


class Case(NamedTuple):
    """A load in the words of both clients."""

    name: str
    num_requests: int
    ours: tuple[str, ...]
    guidellm: str


CASES = (
    Case("10 requests/s", 150, ("--request-rate", "10", "--burstiness", "inf"), "kind=constant,rate=10"),
    Case("8 streams", 160, ("--max-concurrency", "8"), "kind=concurrent,streams=8"),
)


@contextmanager
def stand_in() -> Iterator[str]:
    """Runs the server in a process of its own; yields its address."""
    command = [sys.executable, str(STAND_IN), "--port", "0", f"--ttft-ms={TTFT_MS}", f"--itl-ms={ITL_MS}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def run(command: Sequence[str], folder: str) -> str:
    """Standard output of a client, which must succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} ends with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def ours(address: str, case: Case, folder: str) -> Figures:
    """The figures of `hetis bench serve`."""
    lengths = ("--input-len", str(INPUT_LEN), "--output-len", str(OUTPUT_LEN), "--num-prompts", str(case.num_requests))
    command = [sys.executable, "-m", "hetis", "bench", "serve", "--base-url", address, "--tokenizer", str(TOKENIZER)]
    found = json.loads(run([*command, *lengths, *case.ours, "--metric-percentiles", "95"], folder))
    return {
        **{f"{figure}_ttft_ms": found[f"{figure}_ttft_ms"] for figure in ("mean", "median", "p95")},
        **{f"{figure}_tpot_ms": found[f"{figure}_tpot_ms"] for figure in ("mean", "median", "p95")},
        **{f"{figure}_e2el_ms": found[f"{figure}_e2el_ms"] for figure in ("mean", "median", "p95")},
        "requests": found["completed"],
        "output_tokens": found["total_output_tokens"],
        "requests_per_s": found["request_throughput"],
        "output_tokens_per_s": found["output_throughput"],
    }


def guidellm_metrics(address: str, profile: str, num_requests: int, folder: str) -> dict[str, Any]:
    """The metrics that a run of guidellm reports."""
    report = Path(folder) / "guidellm.json"
    backend = f"kind=openai_http,target={address},request_format=/v1/completions"
    data = f"kind=synthetic_text,prompt_tokens={INPUT_LEN},output_tokens={OUTPUT_LEN}"
    command = [str(GUIDELLM), "run", "--backend", backend, "--data", data, "--profile", profile, "--disable-console"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}", "--output", f"kind=json,path={report}"]
    run([*command, "--constraint", f"kind=max_requests,count={num_requests}"], folder)
    metrics: dict[str, Any] = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    return metrics


def read_guidellm(metrics: dict[str, Any]) -> Figures:
    """Figures of guidellm's metrics of successful requests; its latency is in seconds."""
    found: Figures = {}
    for name, key, factor in (
        ("ttft", "time_to_first_token_ms", 1.0),
        ("tpot", "inter_token_latency_ms", 1.0),
        ("e2el", "request_latency", 1000.0),
    ):
        one = metrics[key]["successful"]
        found[f"mean_{name}_ms"] = factor * one["mean"]
        found[f"median_{name}_ms"] = factor * one["median"]
        found[f"p95_{name}_ms"] = factor * one["percentiles"]["p95"]
    return {
        **found,
        "requests": metrics["request_latency"]["successful"]["count"],
        "output_tokens": metrics["output_token_count"]["successful"]["total_sum"],
        "requests_per_s": metrics["requests_per_second"]["successful"]["mean"],
        "output_tokens_per_s": metrics["output_tokens_per_second"]["successful"]["mean"],
    }


def compare(address: str, case: Case) -> bool:
    """Runs both clients, prints and keeps their figures; whether all agree."""
    from records import append, commit, date, machine

    with tempfile.TemporaryDirectory(prefix="hetis-client-") as folder:
        mine = ours(address, case, folder)
        theirs = read_guidellm(guidellm_metrics(address, case.guidellm, case.num_requests, folder))
    is_ok = True
    for figure, value in mine.items():
        ratio = value / theirs[figure]
        agrees = abs(ratio - 1) <= TOLERANCE
        is_ok &= agrees
        outcome = "ok" if agrees else "DIFFERS"
        print(f"{case.name:14} {figure:20} {value:10.2f} {theirs[figure]:10.2f} {ratio:7.4f}  {outcome}", flush=True)
    row = {
        "date": date(), "machine": machine(), "commit": commit(), "client": "guidellm", "version": version(),
        "case": case.name, "figures": mine, "theirs": theirs, "agrees": is_ok,
    }  # fmt: skip
    append("clients.jsonl", json.dumps(row).encode())
    return is_ok


def version() -> str:
    """The version of guidellm."""
    code = "from importlib.metadata import version; print(version('guidellm'))"
    return run([str(GUIDELLM.parent / "python"), "-c", code], ".").strip()


# --- cost of a client -------------------------------------------------------------------------------------------------

STREAMS_PER_S, SECONDS, TOKENS = 200, 5, 16
PAYLOAD = {"prompt": [5] * INPUT_LEN, "max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True}}


async def cost_of_ours(address: str) -> tuple[float, float]:
    """(CPU us per request, median TTFT in ms) of our client."""
    from hetis.bench_serve.http_client import HttpClient
    from hetis.bench_serve.load import LoadGenerator, Prepared

    client, count = HttpClient(address), STREAMS_PER_S * SECONDS
    data = client.encode("POST", "/v1/completions", PAYLOAD)
    requests = [Prepared(data, INPUT_LEN, number / STREAMS_PER_S) for number in range(count)]
    begin = time.process_time()
    outcome = await LoadGenerator(client, timeout=60).run(requests)
    cost = time.process_time() - begin
    assert all(answer.failure is None for answer in outcome.answers)
    return 1e6 * cost / count, 1000 * median(answer.ttft for answer in outcome.answers)


async def cost_of_httpx(address: str) -> tuple[float, float]:
    """The same of httpx, with its own lines and no more of the analysis than the first token."""
    import httpx

    found, count = [], STREAMS_PER_S * SECONDS

    async def stream(client: httpx.AsyncClient) -> None:
        begin, first = time.perf_counter(), 0.0
        async with client.stream("POST", "/v1/completions", json=PAYLOAD) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                    first = first or time.perf_counter()
        found.append(first - begin)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client, asyncio.TaskGroup() as group:
        begin, start = time.process_time(), time.perf_counter()
        for number in range(count):
            await asyncio.sleep(max(0.0, start + number / STREAMS_PER_S - time.perf_counter()))
            group.create_task(stream(client))
    return 1e6 * (time.process_time() - begin) / count, 1000 * median(found)


def print_costs(address: str) -> None:
    """Both clients in turn, three times."""
    import uvloop

    print(f"{STREAMS_PER_S} streams/s of {TOKENS} tokens for {SECONDS} s; TTFT of the server {TTFT_MS:g} ms")
    clients: dict[str, Callable[[], tuple[float, float]]] = {
        "ours on uvloop": lambda: uvloop.run(cost_of_ours(address)),
        "ours on asyncio": lambda: asyncio.run(cost_of_ours(address)),
        "httpx": lambda: asyncio.run(cost_of_httpx(address)),
    }
    for _ in range(3):
        for name, measure in clients.items():
            cost, ttft = measure()
            print(f"{name:16} {cost:7.0f} us of CPU per stream   median TTFT {ttft:8.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true", help="measure the cost of clients instead")
    options = parser.parse_args()
    if not options.cost and not GUIDELLM.exists():
        sys.exit("bench_client.py needs guidellm: run `make install-clients` first.")
    with stand_in() as address:
        if options.cost:
            print_costs(address)
            return
        print(f"{'':14} {'':20} {'ours':>10} {'guidellm':>10} {'ratio':>7}")
        agreements = [compare(address, case) for case in CASES]
    sys.exit(not all(agreements))


if __name__ == "__main__":
    main()
