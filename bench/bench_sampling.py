"""Tokens from logits: microseconds of one call of the sampler, by what the sequences ask for.

    python bench/bench_sampling.py                        # vocabulary of Qwen3, 1, 16 and 64 rows of bfloat16
    python bench/bench_sampling.py --cases greedy top_k --threads 1

Logits are normal with a few large ones, as those of language models. Medians and 10 to 90 % of the calls; calls of the
cases alternate. `checksum` is that of all tokens: equal before and after a change that must not change draws.
"""

import argparse
import statistics
import time
import zlib

import numpy as np
import torch

from hetis.core.sampling_params import SamplingParams
from hetis.ranks.sampling.sampler import Sampler

CASES = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(),
    "top_k": SamplingParams(top_k=50),
    "top_p": SamplingParams(top_p=0.9),
    "min_p": SamplingParams(min_p=0.05),
    "top_k_p": SamplingParams(top_k=20, top_p=0.95, temperature=0.6),
    "logprobs": SamplingParams(temperature=0, logprobs=5),
    "penalty": SamplingParams(temperature=0, repetition_penalty=1.1),
}


def make_logits(rows: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, size, generator=generator) * 2.5
    best = torch.randint(size, (rows, 40), generator=generator)
    return logits.scatter(1, best, 8 + 8 * torch.rand(rows, 40, generator=generator)).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    for rows in options.rows:
        logits, slots = make_logits(rows, options.vocabulary), np.arange(rows)
        samplers = {name: Sampler(rows, options.vocabulary, eos_token_ids=[]) for name in options.cases}
        times: dict[str, list[float]] = {name: [] for name in samplers}
        sums = dict.fromkeys(samplers, 0)
        for name, sampler in samplers.items():
            for slot in range(rows):
                sampler.add(slot, CASES[name], 4, slot)
            sampler.observe(np.repeat(slots, 4), np.repeat(slots, 4), np.tile(np.arange(4), rows))
        for call in range(options.calls + 2):
            for name, sampler in samplers.items():
                begin = time.perf_counter()
                token_R = sampler.sample(logits, slots, np.full(rows, 4 + call)).token_R
                if call >= 2:
                    times[name].append(1e6 * (time.perf_counter() - begin))
                sampler.observe(slots, token_R, np.full(rows, 4 + call))
                sums[name] = zlib.crc32(token_R.tobytes(), sums[name])
        for name, each in times.items():
            tenths = statistics.quantiles(each, n=10)
            print(
                f"{rows:3} rows {name:9} {statistics.median(each):9.0f} us ({tenths[0]:.0f}-{tenths[-1]:.0f}), "
                f"checksum {sums[name]:08x}",
                flush=True,
            )


if __name__ == "__main__":
    main()
