"""`hetis bench throughput | latency`: random prompts of given lengths; the JSON has vLLM's key names.

throughput: all requests at once; requests and tokens per second, from the first request sent to the last token.
latency: one batch at a time, from sending to the last token; average and percentiles over the iterations.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from hetis.core.sampling_params import SamplingParams
from hetis.server.arguments import HelpFormatter, add_engine_arguments, engine_arguments

PERCENTILES = (10, 25, 50, 75, 90, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    throughput = kinds.add_parser("throughput", help="many requests at once", formatter_class=HelpFormatter)
    throughput.add_argument("--num-prompts", type=int, default=16, help="requests")
    throughput.set_defaults(run=run_throughput)
    latency = kinds.add_parser("latency", help="one batch at a time", formatter_class=HelpFormatter)
    latency.add_argument("--batch-size", type=int, default=1, help="requests in a batch")
    latency.add_argument("--num-iters-warmup", type=int, default=1, help="batches that do not count")
    latency.add_argument("--num-iters", type=int, default=5, help="batches that count")
    latency.set_defaults(run=run_latency)
    for kind in (throughput, latency):
        kind.add_argument("--input-len", type=int, default=256, help="prompt tokens of each request")
        kind.add_argument("--output-len", type=int, default=64, help="new tokens of each request")
        kind.add_argument("--output-json", type=Path, help="also write the result there")
        add_engine_arguments(kind)


def run_throughput(options: argparse.Namespace) -> None:
    from hetis.server.llm import LLM

    begin = time.perf_counter()
    with LLM(**engine_arguments(options)) as llm:
        prompts, params = _workload(options, llm.vocab_size, options.num_prompts)
        first_token = None
        ready = time.perf_counter()
        num_output = 0
        for piece in llm.stream(prompts, params):
            if first_token is None and piece.token_ids:
                first_token = time.perf_counter()
            num_output += len(piece.token_ids)
        elapsed = time.perf_counter() - ready
    num_tokens = num_output + options.num_prompts * options.input_len
    _publish(
        options,
        {
            "elapsed_time": elapsed,
            "num_requests": options.num_prompts,
            "total_num_tokens": num_tokens,
            "requests_per_second": options.num_prompts / elapsed,
            "tokens_per_second": num_tokens / elapsed,
            "output_tokens_per_second": num_output / elapsed,
            "startup_seconds": ready - begin,
            "time_to_first_token_seconds": (first_token or ready) - begin,  # from the start of the fleet
        },
    )


def run_latency(options: argparse.Namespace) -> None:
    from hetis.server.llm import LLM

    latencies = []
    with LLM(**engine_arguments(options)) as llm:
        for iteration in range(options.num_iters_warmup + options.num_iters):
            prompts, params = _workload(options, llm.vocab_size, options.batch_size, iteration)
            begin = time.perf_counter()
            for _ in llm.stream(prompts, params):
                pass
            if iteration >= options.num_iters_warmup:
                latencies.append(time.perf_counter() - begin)
    _publish(
        options,
        {
            "avg_latency": statistics.fmean(latencies),
            "latencies": latencies,
            "percentiles": {str(q): _percentile(latencies, q) for q in PERCENTILES},
        },
    )


def _workload(
    options: argparse.Namespace, vocab_size: int, count: int, salt: int = 0
) -> tuple[list[list[int]], SamplingParams]:
    """Random token ids; greedy; every request runs to its full length."""
    draw = random.Random(options.seed + salt)
    prompts = [[draw.randrange(vocab_size) for _ in range(options.input_len)] for _ in range(count)]
    return prompts, SamplingParams(max_tokens=options.output_len, temperature=0, ignore_eos=True, detokenize=False)


def _percentile(values: list[float], q: int) -> float:
    """Linear interpolation between the closest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _publish(options: argparse.Namespace, result: dict[str, object]) -> None:
    text = json.dumps(result, indent=2)
    print(text)
    sys.stdout.flush()
    if options.output_json is not None:
        options.output_json.write_text(text + "\n")
