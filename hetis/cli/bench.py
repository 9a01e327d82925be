"""`hetis bench throughput | latency | serve | plot`: benchmarks; the last two are in `bench_serve`.

throughput: all requests at once; requests and tokens per second, from the first request sent to the last token.
latency: one batch at a time, from sending to the last token; average and percentiles over the iterations.
JSON with vLLM's key names goes to standard output, a table of the same figures to standard error.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hetis.cli import bench_serve
from hetis.cli.arguments import add_engine_arguments, engine_arguments, engine_config
from hetis.cli.numbers import count
from hetis.core.files import check_writable, write_file
from hetis.core.sampling_params import SamplingParams
from hetis.core.sizes import plural
from hetis.frontend.console import new_table, render, write, write_message
from hetis.frontend.progress import progress_bar

PERCENTILES = (10, 25, 50, 75, 90, 99)
DIGITS = 6  # significant digits of measured numbers in the JSON
OUTPUT = "--output-json"
EXAMPLES = """examples:
  hetis bench throughput ./model --num-prompts 64 --input-len 256 --output-len 64
  hetis bench latency ./model --plan 1+2 --batch-size 8 --output-json latency.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two kinds of benchmark with their options."""
    parser.set_defaults(run=lambda _: parser.print_help())
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", title="kinds")
    text = "measure throughput: requests and tokens per second with many requests at once"
    throughput = kinds.add_parser("throughput", help=text, description=f"{text.capitalize()}.", epilog=EXAMPLES)
    add = throughput.add_argument_group("load").add_argument
    add("--num-prompts", type=count(1), metavar="N", default=16, help="number of requests")
    _add_lengths(throughput, add)
    throughput.set_defaults(run=run_throughput)
    text = "measure latency: seconds until the last token of one batch at a time"
    latency = kinds.add_parser("latency", help=text, description=f"{text.capitalize()}.", epilog=EXAMPLES)
    add = latency.add_argument_group("load").add_argument
    add("--batch-size", type=count(1), metavar="N", default=1, help="requests in a batch")
    add("--num-iters-warmup", type=count(0), metavar="N", default=1, help="batches before the measurement")
    add("--num-iters", type=count(1), metavar="N", default=5, help="measured batches")
    _add_lengths(latency, add)
    latency.set_defaults(run=run_latency)
    for kind, text, add_options, examples in (
        ("serve", bench_serve.SERVE_TEXT, bench_serve.add_serve, bench_serve.SERVE_EXAMPLES),
        ("plot", bench_serve.PLOT_TEXT, bench_serve.add_plot, bench_serve.PLOT_EXAMPLES),
    ):
        description = f"{text[0].upper()}{text[1:]}."
        add_options(kinds.add_parser(kind, help=text, description=description, epilog=examples))


def _add_lengths(parser: argparse.ArgumentParser, add: Any) -> None:
    add("--input-len", type=count(1), metavar="N", default=256, help="tokens of each prompt")
    add("--output-len", type=count(1), metavar="N", default=64, help="tokens of each output")
    add(OUTPUT, type=Path, metavar="FILE", help="write the JSON to FILE as well")
    add_engine_arguments(parser)


def run_throughput(options: argparse.Namespace) -> None:
    """Runs `hetis bench throughput`."""
    _check(options)
    result = _measure_throughput(options)
    rows = [
        ("requests", f"{options.num_prompts} of {options.input_len} + {options.output_len} tokens"),
        ("time", f"{result['elapsed_time']:.2f} s"),
        ("requests per second", f"{result['requests_per_second']:.3g}"),
        ("tokens per second, prompts and outputs", f"{result['tokens_per_second']:.1f}"),
        ("output tokens per second", f"{result['output_tokens_per_second']:.1f}"),
        ("start of the fleet", f"{result['startup_seconds']:.1f} s"),
        ("start of the fleet to first token", f"{result['startup_to_first_token_seconds']:.1f} s"),
    ]
    publish(options, result, rows)


def _measure_throughput(options: argparse.Namespace) -> dict[str, float]:
    """Figures under vLLM's key names; times in seconds."""
    from hetis.frontend.llm import LLM

    begin = time.perf_counter()
    with LLM(**engine_arguments(options)) as llm:
        check_lengths(options, llm.max_model_len)
        prompts, params = _workload(options, llm.vocab_size, options.num_prompts)
        first_token, num_output, ready = None, 0, time.perf_counter()
        with progress_bar("requests", options.num_prompts, show=options.progress) as bar:
            for piece in llm.stream(prompts, params):
                if first_token is None and piece.token_ids:
                    first_token = time.perf_counter()
                num_output += len(piece.token_ids)
                if piece.finished:
                    bar.advance()
        elapsed = time.perf_counter() - ready
    num_tokens = num_output + options.num_prompts * options.input_len
    return {
        "elapsed_time": elapsed,
        "num_requests": options.num_prompts,
        "total_num_tokens": num_tokens,
        "requests_per_second": options.num_prompts / elapsed,
        "tokens_per_second": num_tokens / elapsed,
        "output_tokens_per_second": num_output / elapsed,
        "startup_seconds": ready - begin,
        "startup_to_first_token_seconds": (first_token or ready) - begin,
    }


def run_latency(options: argparse.Namespace) -> None:
    """Runs `hetis bench latency`."""
    _check(options)
    latencies = _measure_latencies(options)
    percentiles = percentiles_of(latencies)
    average = statistics.fmean(latencies)
    size = f"{plural(options.batch_size, 'request')} of {options.input_len} + {options.output_len} tokens"
    rows = [
        ("batch", size),
        ("batches", str(options.num_iters)),
        ("average", f"{average:.3f} s"),
        *((f"{q} % within", f"{seconds:.3f} s") for q, seconds in percentiles.items()),
    ]
    publish(options, {"avg_latency": average, "latencies": latencies, "percentiles": percentiles}, rows)


def _measure_latencies(options: argparse.Namespace) -> list[float]:
    """Seconds of each measured batch."""
    from hetis.frontend.llm import LLM

    latencies, num_batches = [], options.num_iters_warmup + options.num_iters
    with LLM(**engine_arguments(options)) as llm:
        check_lengths(options, llm.max_model_len)
        with progress_bar("batches", num_batches, show=options.progress) as bar:
            for iteration in range(num_batches):
                prompts, params = _workload(options, llm.vocab_size, options.batch_size, iteration)
                begin = time.perf_counter()
                for _ in llm.stream(prompts, params):
                    pass
                latencies.append(time.perf_counter() - begin)
                bar.advance()
    return latencies[options.num_iters_warmup :]


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for errors that can be found before the fleet starts."""
    from hetis.launch.checks import plan_for

    if options.output_json is not None:
        check_writable(options.output_json, OUTPUT, (options.plan, options.profile, options.trace))
    _, spec, _ = plan_for(engine_config(options))
    check_lengths(options, min(options.max_model_len or spec.max_position, spec.max_position))


def check_lengths(options: argparse.Namespace, max_model_len: int) -> None:
    """Raises ValueError for sequences longer than `max_model_len`, which the model and the memory allow."""
    total = options.input_len + options.output_len
    if total > max_model_len:
        raise ValueError(
            f"--input-len {options.input_len} and --output-len {options.output_len} make sequences of {total} tokens, "
            f"but the model and the memory allow {max_model_len}; lower one of them."
        )


def _workload(
    options: argparse.Namespace, vocab_size: int, count: int, salt: int = 0
) -> tuple[list[list[int]], SamplingParams]:
    """Random token ids and greedy parameters with which every request reaches its full length."""
    draw = random.Random(options.seed + salt)
    prompts = [[draw.randrange(vocab_size) for _ in range(options.input_len)] for _ in range(count)]
    return prompts, SamplingParams(max_tokens=options.output_len, temperature=0, ignore_eos=True, detokenize=False)


def percentiles_of(values: Sequence[float]) -> dict[str, float]:
    """Percentiles by their number, with linear interpolation between the closest values, as in vLLM."""
    import numpy as np

    return dict(zip(map(str, PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True))


def publish(options: argparse.Namespace, result: dict[str, Any], rows: Sequence[tuple[str, str]]) -> None:
    """Writes `result` as JSON to standard output and the user's file, `rows` as a table to standard error."""
    text = json.dumps(rounded(result), indent=2) + "\n"
    if options.output_json is not None:
        write_file(options.output_json, text.encode(), OUTPUT)
    table = new_table([""], [""])
    table.show_header = False
    for row in rows:
        table.add_row(*row)
    write_message(f"\n{render(table)}\n")
    write(text)


def rounded(value: Any) -> Any:
    """The same JSON with measured numbers rounded to their significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
