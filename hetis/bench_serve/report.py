"""Results as tables and files."""

import json
from collections.abc import Sequence
from pathlib import Path

from hetis.bench_serve.metrics import DETAILS, Result
from hetis.bench_serve.settings import TITLES
from hetis.core.sizes import plural
from hetis.frontend.console import new_table, render

LARGEST_DELAY_MS = 10.0  # of the client's event loop, above which its stamps are in doubt


def without_details(result: Result) -> Result:
    """The result without the values of single requests."""
    return {key: value for key, value in result.items() if key not in DETAILS}


def one_table(result: Result, metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The figures of one run."""
    goodput = result["request_goodput"]
    rows = [
        ("requests completed", f"{result['completed']}"),
        ("requests failed", f"{result['failed']}"),
        ("duration", f"{result['duration']:.2f} s"),
        ("input tokens", f"{result['total_input_tokens']}"),
        ("output tokens", f"{result['total_output_tokens']} (from {result['output_tokens_from'] or 'nothing'})"),
        ("requests per second", f"{result['request_throughput']:.2f}"),
        *([] if goodput is None else [("requests per second within the goals", f"{goodput:.2f}")]),
        ("output tokens per second", f"{result['output_throughput']:.1f}"),
        ("tokens per second, input and output", f"{result['total_token_throughput']:.1f}"),
        ("peak of output tokens per second", f"{result['max_output_tokens_per_s']:.0f}"),
        ("peak of concurrent requests", f"{result['max_concurrent_requests']}"),
    ]
    table = new_table([""], [""])
    table.show_header = False
    for row in rows:
        table.add_row(*row)
    return f"{render(table)}\n\n{_latencies(result, metrics, percentiles)}"


def _latencies(result: Result, metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    columns = ["mean", "median", "std", *(f"p{q:g}" for q in percentiles)]
    table = new_table(["ms"], columns)
    for name in dict.fromkeys((*metrics, "client_queue_time")):
        table.add_row(TITLES[name], *(f"{result[f'{column}_{name}_ms']:.2f}" for column in columns))
    return render(table)


def comparison(results: Sequence[Result], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """A line for each rate."""
    shown = [name for name in ("ttft", "tpot", "e2el") if name in metrics]
    columns = ["median", *(f"p{q:g}" for q in percentiles)]
    has_goals = any(result["request_goodput"] is not None for result in results)
    names = ["completed", "failed", "requests/s", *(["goodput"] if has_goals else []), "output tokens/s"]
    table = new_table(["rate"], [*names, *(f"{name.upper()} {column} ms" for name in shown for column in columns)])
    for result in results:
        rate = result["request_rate"]
        table.add_row(
            rate if isinstance(rate, str) else f"{rate:g}",
            f"{result['completed']}",
            f"{result['failed']}",
            f"{result['request_throughput']:.2f}",
            *([f"{result['request_goodput']:.2f}"] if has_goals else []),
            f"{result['output_throughput']:.1f}",
            *(f"{result[f'{column}_{name}_ms']:.1f}" for name in shown for column in columns),
        )
    return render(table)


def remarks(result: Result) -> list[str]:
    """Failures by kind, and what makes the figures doubtful."""
    lines = [
        f"{plural(found['count'], 'request')} failed: {kind}: {found['first']}"
        for kind, found in result["failures"].items()
    ]
    if (delay := result["max_event_loop_delay_ms"]) > LARGEST_DELAY_MS:
        lines.append(
            f"this client was late by up to {delay:.1f} ms (99 % of the time by at most "
            f"{result['p99_event_loop_delay_ms']:.1f} ms), and latencies may be too long by as much; "
            "run it on a machine or core of its own, or with less load."
        )
    if result["completed"] and 2 * result["empty_first_chunks"] > result["completed"]:
        lines.append("most streams began with a chunk without text: times to the first token may be too short.")
    if result["completed"] and "chunks" in result["output_tokens_from"]:
        lines.append("the server sends no usage: each chunk counts as one output token.")
    return lines


def file_name(results: Sequence[Result], label: str | None) -> str:
    """The default name of a file for `results`, by vLLM's scheme."""
    result, rates = results[0], [one["request_rate"] for one in results]
    rate = "_".join(f"{rate:g}" if isinstance(rate, float) else str(rate) for rate in rates)
    limit = result["max_concurrency"]
    model = str(result["model_id"]).rstrip("/").rpartition("/")[2]
    concurrency = "" if limit is None else f"-concurrency{limit}"
    return f"{label or result['backend']}-{rate}qps{concurrency}-{model}-{result['date']}.json"


def lines_of(results: Sequence[Result]) -> str:
    """One line of JSON per run: a file of a single run is a JSON object, as vLLM's."""
    return "".join(json.dumps(result) + "\n" for result in results)


def read_results(path: Path) -> list[Result]:
    """The results in a file of `lines_of`, of vLLM's benchmark, or in a list. Raises ValueError for other content."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    decoder, results, position = json.JSONDecoder(), [], 0
    try:
        while text[position:].strip():
            position += len(text[position:]) - len(text[position:].lstrip())
            found, position = decoder.raw_decode(text, position)
            results += found if isinstance(found, list) else [found]
    except ValueError:
        results = []
    if not results or not all(isinstance(one, dict) and "request_rate" in one for one in results):
        raise ValueError(f"{path} has no results of a benchmark; give a file of `hetis bench serve --save-result`.")
    return results
