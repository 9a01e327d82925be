"""A soak of `hetis serve`: mixed lengths, clients that go away, bad requests; memory, descriptors and pages stay flat.

    make soak                                   # 20 minutes after a warm-up of 20
    python bench/soak_server.py --minutes 60 --plan 1+2

After the warm-up the slope of RssAnon of every process must be at most 1 MiB an hour beyond twice its own uncertainty,
which must be small enough to tell; descriptors and threads must not grow, and at the end no page may be in use. A row
goes to bench/results/soak.jsonl; the exit code is 1 if something grows or a request fails.

The warm-up is as long as that because malloc takes so long to have met every mix of lengths: under this load the
primary grows by 2 MiB in its first 12 minutes, and the root by 3 MiB in 15. What happens later is what counts. Memory
goes up and down for a minute at a time, so a slope and its uncertainty come from the means of tenths of the time, which
do not depend on each other as single samples do.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import records
from extras import need
from records import commit, date, machine

need("httpx", "numpy", "psutil")
import httpx  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from bench_server import START_SECONDS, free_port, started  # noqa: E402

CLIENTS = 12
SAMPLE_SECONDS = 5.0
LIMIT = 1 << 20  # bytes an hour
UNCERTAINTY = 4 << 20  # of a slope, in bytes an hour, beyond which the run was too short or too restless to tell
TENTHS = 10
BAD: list[dict[str, Any]] = [
    {"prompt": "x", "temperature": 9},
    {"prompt": [1 << 30]},
    {"prompt": "x", "n": 0},
    {"prompt": "x", "logit_bias": {"-1": 1}},
    {"prompt": ""},
]


def anonymous_bytes(process: psutil.Process) -> int:
    """RssAnon and VmSwap: memory that only this process holds."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split(":")[1] for line in lines if ":" in line}
    return sum(1024 * int(values[name].split()[0]) for name in ("RssAnon", "VmSwap"))


class Samples:
    """Memory, descriptors and threads of all processes of the server over time."""

    def __init__(self, root: psutil.Process) -> None:
        members = [root, *root.children(recursive=True)]
        self._members = {f"{process.pid} {' '.join(process.cmdline()[-3:])[:60]}": process for process in members}
        self._rows: dict[str, list[tuple[float, int, int, int]]] = {name: [] for name in self._members}

    def take(self, now: float) -> None:
        for name, process in self._members.items():
            row = (now, anonymous_bytes(process), process.num_fds(), process.num_threads())
            self._rows[name].append(row)

    def report(self, begin: float) -> dict[str, dict[str, Any]]:
        """By process, from `begin` on: slope of memory, its standard error, growth of descriptors and threads.

        `tenths`: mean MiB in each tenth of that time, to which the slope is fitted.
        """
        found = {}
        for name, rows in self._rows.items():
            table = np.array([row for row in rows if row[0] >= begin])
            tenths = np.array([part[:, :2].mean(axis=0) for part in np.array_split(table, TENTHS)])
            (slope, _), covariance = np.polyfit((tenths[:, 0] - begin) / 3600, tenths[:, 1], 1, cov=True)
            quarter = max(1, len(table) // 4)
            growth = table[-quarter:].mean(axis=0) - table[:quarter].mean(axis=0)
            found[name] = {
                "bytes": float(table[-1, 1]),
                "bytes_per_hour": float(slope),
                "error": float(covariance[0, 0] ** 0.5),
                "descriptors": float(growth[2]),
                "threads": float(growth[3]),
                "tenths": [round(float(mean) / 2**20, 2) for mean in tenths[:, 1]],
            }
        return found


async def client(http: httpx.AsyncClient, until: float, seed: int, ends: Counter[str]) -> None:
    """One request after the other: 1 % bad, 5 % cut, lengths from 1 to 400 tokens, half of them streamed."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        if draw.random() < 0.01:
            answer = await http.post("/v1/completions", json=draw.choice(BAD))
            ends["refused" if answer.status_code == 400 else f"bad: {answer.status_code}"] += 1
            continue
        body = {
            "prompt": [draw.randrange(3, 250) for _ in range(draw.choice((1, 7, 60, 300)))],
            "max_tokens": draw.choice((1, 1, 16, 64, 400)),
            "stream": draw.random() < 0.5,
            "ignore_eos": True,
        }
        seconds = draw.uniform(0.0, 2.0) if draw.random() < 0.05 else None
        try:
            answer = await asyncio.wait_for(http.post("/v1/completions", json=body), seconds)
            ends[str(answer.status_code)] += 1
        except TimeoutError:
            ends["cut"] += 1


async def load(
    url: str, root: psutil.Process, warm_up: float, seconds: float
) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
    """(what `Samples.report` gives, answers by kind) of `seconds` after a warm-up of so many seconds."""
    begin = time.monotonic() + warm_up
    samples, ends = Samples(root), Counter[str]()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as http:
        clients = [asyncio.create_task(client(http, begin + seconds, seed, ends)) for seed in range(CLIENTS)]
        while time.monotonic() < begin + seconds:
            await asyncio.sleep(SAMPLE_SECONDS)
            samples.take(time.monotonic())
        await asyncio.gather(*clients)
        for _ in range(100):
            text = (await http.get("/metrics")).text
            usage = next(float(line.split()[-1]) for line in text.splitlines() if "kv_cache_usage_perc{" in line)
            if usage == 0:
                break
            await asyncio.sleep(0.1)
        ends["pages left"] = int(usage > 0)
    return samples.report(begin), ends


def grows(row: dict[str, Any]) -> bool:
    grown = row["bytes_per_hour"] > LIMIT + 2 * row["error"] or row["error"] > UNCERTAINTY
    return bool(grown or row["descriptors"] > 2 or row["threads"] > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--warm-up", type=float, default=20, help="minutes before that, under the same load")
    parser.add_argument("--plan", default="1+1")
    options = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "hetis", "serve", "--plan", options.plan, "--port", str(port)]
    command += ["--dispatch", "even", "--device", "cpu", "--kv-cache-memory", "64MiB", "--log-level", "error"]
    with started(command, f"{url}/readyz", START_SECONDS) as process:
        report, ends = asyncio.run(load(url, psutil.Process(process.pid), 60 * options.warm_up, 60 * options.minutes))
    code = process.returncode
    for name, found in report.items():
        mark = "GROWS" if grows(found) else "flat"
        print(
            f"{name:64} {found['bytes'] / 2**20:7.1f} MiB {found['bytes_per_hour'] / 2**20:+8.2f} MiB/h "
            f"(+- {found['error'] / 2**20:.2f}) "
            f"descriptors {found['descriptors']:+.1f} threads {found['threads']:+.1f} {mark} {found['tenths']}"
        )
    print(dict(ends))
    expected = {"200", "refused", "cut", "pages left"}
    passed = code == 0 and not any(map(grows, report.values())) and set(ends) <= expected and not ends["pages left"]
    row = {
        "date": date(), "machine": machine(), "commit": commit(), "plan": options.plan, "warm_up": options.warm_up,
        "minutes": options.minutes,
        "processes": report, "ends": ends, "passed": passed,
    }  # fmt: skip
    records.append("soak.jsonl", json.dumps(row).encode())
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
