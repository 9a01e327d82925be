"""Outside clients against `hetis serve` with the small model: every request of theirs must succeed.

    make test-clients                                  # all of them
    python bench/outside_clients.py --only guidellm lm-eval

`make install-clients` installs each into an environment of its own, `.venv-clients/NAME`; openai for Node is installed
by npm into a temporary folder. One row per client goes to bench/results/clients.jsonl, and the exit code is 1 if a
client failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import records
from bench_client import guidellm_metrics
from bench_server import START_SECONDS, free_port, started
from records import HERE, commit, date, machine

FILES = HERE / "bench" / "clients"
TOKENIZER = HERE / "hetis" / "assets" / "tiny"
ENVIRONMENTS = HERE / ".venv-clients"  # one of each client: `make install-clients`
MODEL = "tiny"
CLIENT_SECONDS = 600


class FailedError(Exception):
    """A client that did not end well; the text is the end of its output."""


@contextmanager
def server() -> Iterator[str]:
    """`hetis serve` with the small model and a chat template; its base URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "hetis", "serve", "--port", str(port), "--served-model-name", MODEL]
    command += ["--chat-template", str(FILES / "chat.jinja"), "--kv-cache-memory", "64MiB", "--device", "cpu"]
    with started([*command, "--log-level", "warning"], f"{url}/readyz", START_SECONDS):
        yield url


def program(client: str, name: str) -> str:
    """Path of a program in the environment of a client."""
    return str(ENVIRONMENTS / client / "bin" / name)


def run(command: list[str], folder: Path) -> str:
    """Runs a client in `folder`; its output. FailedError unless it exits with 0."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OPENAI_API_KEY": "none",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=CLIENT_SECONDS,
        check=False,
    )
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise FailedError(f"exit code {done.returncode}: {output[-3000:]}")
    return output


# --- the clients: each returns (requests, failed) ---------------------------------------------------------------------


def script(output: str) -> tuple[int, int]:
    """From the last line of our own scripts."""
    found = re.search(r"(\d+) requests, (\d+) failed", output)
    assert found is not None, output
    return int(found[1]), int(found[2])


def langchain(url: str, folder: Path) -> tuple[int, int]:
    return script(run([program("langchain", "python"), str(FILES / "langchain_client.py"), f"{url}/v1", MODEL], folder))


def litellm(url: str, folder: Path) -> tuple[int, int]:
    return script(run([program("litellm", "python"), str(FILES / "litellm_client.py"), f"{url}/v1", MODEL], folder))


def openai_node(url: str, folder: Path) -> tuple[int, int]:
    if shutil.which("npm") is None:
        raise FailedError("npm is not installed.")
    run(["npm", "install", "--silent", "--no-audit", "--no-fund", "openai"], folder)
    shutil.copy(FILES / "openai_client.mjs", folder)
    return script(run(["node", "openai_client.mjs", f"{url}/v1", MODEL], folder))


def guidellm(url: str, folder: Path) -> tuple[int, int]:
    totals = guidellm_metrics(url, "kind=concurrent,streams=4", 24, str(folder))["request_totals"]
    return totals["total"], totals["errored"] + totals["incomplete"]


def aiperf(url: str, folder: Path) -> tuple[int, int]:
    total, failed, _ = _aiperf(url, folder, [])
    return total, failed


def aiperf_cancelling(url: str, folder: Path) -> tuple[int, int]:
    """Half of the requests are cut 20 ms after they were sent: those are not failures."""
    more = ["--request-cancellation-rate", "50", "--request-cancellation-delay", "0.02"]
    total, failed, cancelled = _aiperf(url, folder, more)
    if not cancelled:
        raise FailedError("no request was cancelled.")
    return total, failed


def _aiperf(url: str, folder: Path, more: list[str]) -> tuple[int, int, int]:
    """(requests, failed, cancelled)."""
    snapshots = folder / "hf" / "hub" / "models--hetis--tiny"  # aiperf finds a tokenizer in a hub's cache only
    shutil.copytree(TOKENIZER, snapshots / "snapshots" / ("0" * 40))
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text("0" * 40)
    command = [program("aiperf", "aiperf"), "profile", "--url", url, "--model", MODEL, "--tokenizer", "hetis/tiny"]
    command += ["--endpoint-type", "chat", "--streaming", "--concurrency", "4", "--request-count", "40", "--ui", "none"]
    command += [
        "--synthetic-input-tokens-mean",
        "64",
        "--output-tokens-mean",
        "64",
        "--extra-inputs",
        "ignore_eos:true",
    ]
    output = run([*command, "--output-artifact-dir", str(folder / "aiperf"), *more], folder)
    found = next((folder / "aiperf").rglob("profile_export.jsonl"), None)
    if found is None:
        raise FailedError(output[-3000:])
    requests = [json.loads(line) for line in found.read_text().splitlines()]
    cancelled = sum(bool(request["metadata"].get("was_cancelled")) for request in requests)
    return len(requests), sum(bool(request.get("error")) for request in requests) - cancelled, cancelled


def evalscope(url: str, folder: Path) -> tuple[int, int]:
    command = [
        program("evalscope", "evalscope"),
        "perf",
        "--url",
        f"{url}/v1/completions",
        "--api",
        "openai",
        "--model",
        MODEL,
    ]
    command += ["--parallel", "4", "--number", "24", "--dataset", "random", "--tokenizer-path", str(TOKENIZER)]
    command += ["--min-prompt-length", "32", "--max-prompt-length", "64", "--max-tokens", "32", "--stream"]
    run([*command, "--outputs-dir", str(folder / "evalscope")], folder)
    summary = json.loads(next((folder / "evalscope").rglob("benchmark_summary.json")).read_text())
    return int(summary["Total Requests"]), int(summary["Failed Requests"])


def lm_eval(url: str, folder: Path) -> tuple[int, int]:
    """loglikelihood and generate_until; lm-eval stops at the first request that fails."""
    for name in ("lm_eval_words.yaml", "lm_eval_copy.yaml"):
        (folder / name).write_text((FILES / name).read_text().replace("DATA", str(FILES)))
    arguments = f"base_url={url}/v1/completions,model={MODEL},tokenizer={TOKENIZER},num_concurrent=2,max_retries=1"
    command = [
        program("lm-eval", "lm_eval"),
        "--model",
        "local-completions",
        "--model_args",
        arguments,
        "--include_path",
        ".",
    ]
    run([*command, "--tasks", "words,copy", "--output_path", str(folder / "results")], folder)
    results = json.loads(next((folder / "results").rglob("results*.json")).read_text())
    assert set(results["results"]) == {"words", "copy"}
    return sum(each["effective"] for each in results["n-samples"].values()), 0


class Client(NamedTuple):
    environment: str  # folder in .venv-clients
    package: str  # whose version is kept
    run: Callable[[str, Path], tuple[int, int]]


CLIENTS = {
    "langchain": Client("langchain", "langchain-openai", langchain),
    "litellm": Client("litellm", "litellm", litellm),
    "openai-node": Client("", "openai", openai_node),
    "guidellm": Client("guidellm", "guidellm", guidellm),
    "aiperf": Client("aiperf", "aiperf", aiperf),
    "aiperf, half cancelled": Client("aiperf", "aiperf", aiperf_cancelling),
    "evalscope": Client("evalscope", "evalscope", evalscope),
    "lm-eval": Client("lm-eval", "lm_eval", lm_eval),
}


def version_of(client: Client, folder: Path) -> str:
    """Of its package, from the environment or from what npm installed into `folder`."""
    if not client.environment:
        manifest = folder / "node_modules" / client.package / "package.json"
        return str(json.loads(manifest.read_text())["version"]) if manifest.exists() else "not installed"
    code = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    command = [program(client.environment, "python"), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def measure(name: str, url: str) -> bool:
    """Runs a client, prints and keeps what it gave; whether all its requests succeeded."""
    client, begin, error = CLIENTS[name], time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="hetis-clients-") as folder:
        try:
            requests, failed = client.run(url, Path(folder))
        except (FailedError, subprocess.TimeoutExpired, AssertionError, StopIteration) as failure:
            requests, failed, error = 0, 0, str(failure) or type(failure).__name__
        version = version_of(client, Path(folder))
    passed = not error and failed == 0 and requests > 0
    print(f"{name:24} {version:10} {requests:4} requests, {failed} failed {error}", flush=True)
    row = {
        "date": date(), "machine": machine(), "commit": commit(), "client": name, "version": version,
        "requests": requests, "failed": failed, "passed": passed, "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip
    records.append("clients.jsonl", json.dumps(row).encode())
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CLIENTS), default=list(CLIENTS), help="clients")
    options = parser.parse_args()
    with server() as url:
        outcomes = [measure(name, url) for name in options.only]
    sys.exit(0 if all(outcomes) else 1)


if __name__ == "__main__":
    main()
