"""Outside clients against `hetis serve` with the small model: every request of theirs must succeed.

    make test-clients                                  # all of them
    python bench/outside_clients.py --only guidellm lm-eval

`make install-clients` installs them into `.venv-clients`; openai for Node is installed by npm into a temporary folder.
One row per client goes to bench/results/clients.jsonl, and the exit code is 1 if a client failed.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import records
from records import HERE, commit, date, machine

FILES = HERE / "bench" / "clients"
TOKENIZER = HERE / "hetis" / "assets" / "tiny"
BIN = HERE / ".venv-clients" / "bin"
MODEL = "tiny"
START_SECONDS, CLIENT_SECONDS = 60, 600


class FailedError(Exception):
    """A client that did not end well; the text is the end of its output."""


@contextmanager
def server() -> Iterator[str]:
    """`hetis serve` with the small model and a chat template; its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hetis", "serve", "--port", str(port), "--served-model-name", MODEL]
    command += ["--chat-template", str(FILES / "chat.jinja"), "--kv-cache-memory", "64MiB", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(f"http://127.0.0.1:{port}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("outside_clients: the server did not start.")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def is_ready(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/readyz", timeout=2).status == 200)
    except OSError:
        return False


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
    return script(run([str(BIN / "python"), str(FILES / "langchain_client.py"), f"{url}/v1", MODEL], folder))


def litellm(url: str, folder: Path) -> tuple[int, int]:
    return script(run([str(BIN / "python"), str(FILES / "litellm_client.py"), f"{url}/v1", MODEL], folder))


def openai_node(url: str, folder: Path) -> tuple[int, int]:
    if shutil.which("npm") is None:
        raise FailedError("npm is not installed.")
    run(["npm", "install", "--silent", "--no-audit", "--no-fund", "openai"], folder)
    shutil.copy(FILES / "openai_client.mjs", folder)
    return script(run(["node", "openai_client.mjs", f"{url}/v1", MODEL], folder))


def guidellm(url: str, folder: Path) -> tuple[int, int]:
    command = [str(BIN / "guidellm"), "benchmark", "run", "--target", url, "--profile", "concurrent", "--rate", "4"]
    command += ["--max-requests", "24", "--data", "prompt_tokens=64,output_tokens=32", "--processor", str(TOKENIZER)]
    run([*command, "--output-path", str(folder / "guidellm.json")], folder)
    report = json.loads((folder / "guidellm.json").read_text())
    totals = [benchmark["metrics"]["request_totals"] for benchmark in report["benchmarks"]]
    return sum(each["total"] for each in totals), sum(each["errored"] for each in totals)


def aiperf(url: str, folder: Path) -> tuple[int, int]:
    return _aiperf(url, folder, [])


def aiperf_cancelling(url: str, folder: Path) -> tuple[int, int]:
    """Half of the requests are cut after 0.1 s: those are not failures."""
    return _aiperf(url, folder, ["--request-cancellation-rate", "50", "--request-cancellation-delay", "0.1"])


def _aiperf(url: str, folder: Path, more: list[str]) -> tuple[int, int]:
    command = [str(BIN / "aiperf"), "profile", "--model", MODEL, "--url", url, "--endpoint-type", "chat", "--streaming"]
    command += ["--concurrency", "4", "--request-count", "40", "--tokenizer", str(TOKENIZER), "--ui", "none"]
    command += [
        "--synthetic-input-tokens-mean",
        "64",
        "--output-tokens-mean",
        "32",
        "--extra-inputs",
        "ignore_eos:true",
    ]
    output = run([*command, "--output-artifact-dir", str(folder / "aiperf"), *more], folder)
    records = [
        json.loads(line) for line in next((folder / "aiperf").rglob("profile_export.jsonl")).read_text().splitlines()
    ]
    failed = [record for record in records if record.get("error") and not record["metadata"].get("was_cancelled")]
    if not records:
        raise FailedError(output[-3000:])
    return len(records), len(failed)


def evalscope(url: str, folder: Path) -> tuple[int, int]:
    command = [str(BIN / "evalscope"), "perf", "--url", f"{url}/v1/completions", "--api", "openai", "--model", MODEL]
    command += ["--parallel", "4", "--number", "24", "--dataset", "random", "--tokenizer-path", str(TOKENIZER)]
    command += ["--min-prompt-length", "32", "--max-prompt-length", "64", "--max-tokens", "32", "--stream"]
    run([*command, "--outputs-dir", str(folder / "evalscope")], folder)
    summary = json.loads(next((folder / "evalscope").rglob("benchmark_summary.json")).read_text())
    return int(summary["Total requests"]), int(summary["Failed requests"])


def lm_eval(url: str, folder: Path) -> tuple[int, int]:
    """loglikelihood and generate_until; lm-eval stops at the first request that fails."""
    for name in ("lm_eval_words.yaml", "lm_eval_copy.yaml"):
        (folder / name).write_text((FILES / name).read_text().replace("DATA", str(FILES)))
    arguments = f"base_url={url}/v1/completions,model={MODEL},tokenizer={TOKENIZER},num_concurrent=2,max_retries=1"
    command = [str(BIN / "lm_eval"), "--model", "local-completions", "--model_args", arguments, "--include_path", "."]
    run([*command, "--tasks", "words,copy", "--output_path", str(folder / "results")], folder)
    results = json.loads(next((folder / "results").rglob("results*.json")).read_text())
    assert set(results["results"]) == {"words", "copy"}
    return sum(each["effective"] for each in results["n-samples"].values()), 0


CLIENTS: dict[str, tuple[str, Callable[[str, Path], tuple[int, int]]]] = {
    "langchain": ("langchain-openai", langchain),
    "litellm": ("litellm", litellm),
    "openai-node": ("", openai_node),
    "guidellm": ("guidellm", guidellm),
    "aiperf": ("aiperf", aiperf),
    "aiperf, half cancelled": ("aiperf", aiperf_cancelling),
    "evalscope": ("evalscope", evalscope),
    "lm-eval": ("lm_eval", lm_eval),
}


def version_of(package: str) -> str:
    """Version of a package in `.venv-clients`; "" for a client that has no package."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([str(BIN / "python"), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if package else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CLIENTS), default=list(CLIENTS), help="clients")
    options = parser.parse_args()
    all_passed = True
    with server() as url:
        for name in options.only:
            package, client = CLIENTS[name]
            begin, error = time.monotonic(), ""
            with tempfile.TemporaryDirectory(prefix="hetis-clients-") as folder:
                try:
                    requests, failed = client(url, Path(folder))
                except (FailedError, subprocess.TimeoutExpired, AssertionError, StopIteration) as failure:
                    requests, failed, error = 0, 0, str(failure) or type(failure).__name__
            passed = not error and failed == 0 and requests > 0
            all_passed &= passed
            print(
                f"{name:24} {version_of(package):10} {requests:4} requests, {failed} failed {error[-3000:]}", flush=True
            )
            row = {
                "date": date(), "machine": machine(), "commit": commit(), "client": name,
                "version": version_of(package), "requests": requests, "failed": failed, "passed": passed,
                "seconds": round(time.monotonic() - begin, 1),
            }  # fmt: skip
            records.append("clients.jsonl", json.dumps(row).encode())
    sys.exit(0 if all_passed else 1)


if __name__ == "__main__":
    main()
