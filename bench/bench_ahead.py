"""What it gives to schedule a step while one runs: `LLM.generate` with `async_scheduling` off and on.

    python bench/bench_ahead.py [--model MODEL] [--plan 1+0] [--rounds 7] [--requests 1 16 64] [--output-len 200]

Two fleets of one model are up at once and take turns, so that a noisy machine disturbs both alike; the idle one waits
for messages. A step here is one token of every request; what is hidden, at most, is the driver's part of a step: its
result, schedule, command and the messages. The smaller the model and the more the requests, the larger that part.
"""

import argparse
import random
import time
from statistics import median
from typing import Any

from hetis import LLM, SamplingParams

Seconds = dict[bool, list[float]]


def measure(fleets: dict[bool, LLM], prompts: list[list[int]], params: SamplingParams, rounds: int) -> Seconds:
    """Seconds of each run of all prompts, by whether a step is scheduled while one runs; first runs do not count."""
    seconds: Seconds = {ahead: [] for ahead in fleets}
    for round_index in range(rounds + 1):
        for ahead, llm in fleets.items():
            begin = time.perf_counter()
            llm.generate(prompts, params)
            if round_index:
                seconds[ahead].append(time.perf_counter() - begin)
    return seconds


def report(seconds: Seconds, num_requests: int, num_tokens: int) -> None:
    for ahead, runs in seconds.items():
        rates = sorted(num_requests * num_tokens / each for each in runs)
        print(
            f"{num_requests:4} requests, depth {int(ahead)}: {median(rates):8.1f} tokens/s ({rates[0]:.1f} to "
            f"{rates[-1]:.1f}), {1e3 * median(runs) / num_tokens:7.3f} ms per step",
            flush=True,
        )
    ratios = sorted(off / on for off, on in zip(seconds[False], seconds[True], strict=True))
    gain = f"{median(ratios):8.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    print(f"{num_requests:4} requests, depth 1 over depth 0: {gain}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the small model in the package")
    parser.add_argument("--plan", default="1+0")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--input-len", type=int, default=16, help="tokens of a prompt (default 16)")
    parser.add_argument("--output-len", type=int, default=200, help="tokens of an output (default 200)")
    options = parser.parse_args()
    params = SamplingParams(max_tokens=options.output_len, temperature=0, ignore_eos=True, detokenize=False)
    common: dict[str, Any] = {"plan": options.plan, "kv_cache_memory": "512MiB", "oversubscribe": True}
    with LLM(options.model, **common) as on, LLM(options.model, **common, async_scheduling=False) as off:
        draw = random.Random(0)
        for count in options.requests:
            prompts = [[draw.randrange(on.vocab_size) for _ in range(options.input_len)] for _ in range(count)]
            report(measure({False: off, True: on}, prompts, params, options.rounds), count, options.output_len)


if __name__ == "__main__":
    main()
