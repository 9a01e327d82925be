"""CPU attention against the limits of the machine: decode against streaming reads, prefill against torch's attention.

Decode reads every cached byte once and multiplies it by M queries. So its baseline is a plain sum over the same bytes,
in order, with the same threads, or the arithmetic bound, whichever is lower: the rate at which bytes would be read if
nothing but decode's products took time, measured in registers. Several pools are read in turn, as by a model with
several layers, so that caches hold nothing of the previous round. Pages lie in order, as the allocator hands them to
sequences that arrive one after the other, or shuffled, the worst case after long serving. Each round measures the sum,
the products and both orders one after the other, because the memory of shared machines changes its speed within
seconds: shares are those of a round, and medians (least - most) of all rounds are printed. A median share below the
aim is a miss and gives exit code 1.

Prefill is bound by arithmetic, so its baselines are FLOP/s and `scaled_dot_product_attention` on the same, already
gathered, keys and values (repeated for grouped queries, as torch's CPU kernel requires). There and for small calls the
two sides alternate in one process, and the best of all rounds counts for each.

    python bench/bench_cpu_attention.py [decode|pages|small|prefill ...] [--threads N] [--rounds N] [--isa NAME]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, as in a rank; before torch

import torch
from torch.nn import functional

from hetis_kernels import extension
from hetis_kernels.paged_decode import paged_decode
from hetis_kernels.varlen_prefill import paged_prefill

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_seconds(rounds: int, *sides: list[Callable[[], Any]]) -> list[float]:
    """Best time of any function of each side, over alternating rounds."""
    best = [float("inf")] * len(sides)
    for _ in range(rounds):
        for i, side in enumerate(sides):
            for call in side:
                start = time.perf_counter()
                call()
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def make_pool(
    num_lanes: int, tokens: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool of random values and a table that spreads every lane's pages over all of it."""
    pages = -(-tokens // page_size)
    pool = torch.randn(2, num_lanes * pages, page_size, head_dim).to(dtype)
    return pool, torch.randperm(num_lanes * pages).int().view(num_lanes, pages)


def decode_calls(
    num_lanes: int, tokens: int, queries: int, head_dim: int, page_size: int, dtype: torch.dtype, layers: int
) -> tuple[list[Callable[[], Any]], list[Callable[[], Any]], list[Callable[[], Any]]]:
    """Calls, one per layer, of: decode with pages in order, decode with pages shuffled, and a read of the pool."""
    pool, shuffled = make_pool(num_lanes, tokens, head_dim, page_size, dtype)
    in_order = torch.arange(shuffled.numel()).int().view_as(shuffled)
    q = torch.randn(num_lanes, queries, head_dim).to(dtype)
    out = torch.empty_like(q)
    lane = torch.arange(num_lanes).int()
    length = torch.full_like(lane, tokens)

    def decode(pool: torch.Tensor, table: torch.Tensor) -> None:
        paged_decode(q, pool, table, lane, lane, length, head_dim**-0.5, 0, out, backend="cpu")

    pools = [pool.clone() for _ in range(layers)]
    return (
        [partial(decode, pool, in_order) for pool in pools],
        [partial(decode, pool, shuffled) for pool in pools],
        [partial(torch.ops.hetis.stream_read, pool) for pool in pools],
    )


class Shares(NamedTuple):
    """Of one line: decode's rates as parts of what the machine allows, one of each round."""

    label: str
    in_order: list[float]
    shuffled: list[float]

    def misses(self, aim: float) -> list[str]:
        both = {"in order": self.in_order, "shuffled": self.shuffled}
        return [f"{self.label}, {order}" for order, shares in both.items() if statistics.median(shares) < aim]


def seconds_of(calls: list[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def products_per_second(like: torch.Tensor) -> float:
    """Products of two values, added to a sum, that all threads together can do a second; takes about a millisecond."""
    start = time.perf_counter()
    products: int = torch.ops.hetis.attention_products(like, 1 << 18)
    return products / (time.perf_counter() - start)


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def decode_row(
    rounds: int, name: str, queries: int, head_dim: int, page_size: int, lanes: int = 32, tokens: int = 4096
) -> Shares:
    dtype = DTYPES[name]
    num_bytes = 2 * lanes * tokens * head_dim * dtype.itemsize
    layers = max(1, 2**28 // num_bytes)
    calls = decode_calls(lanes, tokens, queries, head_dim, page_size, dtype, layers)
    rates: list[list[float]] = [[], [], [], []]  # GB/s: in order, shuffled, the sum, the arithmetic bound
    for _ in range(rounds):
        for rate, side in zip(rates, calls, strict=False):
            rate.append(num_bytes * layers / seconds_of(side) / 1e9)
        rates[3].append(products_per_second(torch.empty(0, dtype=dtype)) * dtype.itemsize / queries / 1e9)
    limits = list(map(min, rates[2], rates[3]))
    label = f"{name} D={head_dim} M={queries} S={page_size}"
    in_order, shuffled = ([rate / limit for rate, limit in zip(side, limits, strict=True)] for side in rates[:2])
    columns = "  ".join(
        f"{spread(rate, '5.1f'):>19s} {spread(share, '4.0%'):>15s}"
        for rate, share in zip(rates[:2], (in_order, shuffled), strict=True)
    )
    print(f"{label:22s} {spread(rates[2], '5.1f'):>19s} {statistics.median(rates[3]):6.1f}  {columns}", flush=True)
    return Shares(label, in_order, shuffled)


HEADER = f"{'sum':>19s} {'bound':>6s}  {'in order':>19s} {'share':>15s}  {'shuffled':>19s} {'share':>15s}   (GB/s)"


def bench_decode(rounds: int) -> list[Shares]:
    print(f"\n{'32 lanes of 4096':22s} {HEADER}")
    shapes = [
        *(("bf16", queries, head_dim) for head_dim in (128, 64, 80) for queries in (1, 2, 4, 8)),
        *((name, queries, 128) for name in ("fp16", "fp32") for queries in (2, 8)),
        ("fp32", 2, 64),
    ]
    return [decode_row(rounds, *shape, 32) for shape in shapes]


def bench_pages(rounds: int) -> list[Shares]:
    print(f"\n{'by page size':22s} {HEADER}")
    sizes = (8, 16, 32, 64, 128)
    return [decode_row(rounds, "bf16", 2, head_dim, page_size) for head_dim in (128, 64) for page_size in sizes]


def bench_small(rounds: int) -> list[Shares]:
    print("\nsmall decode calls, bf16 D=128 M=2: the call, and a read of as many bytes (from the caches if they fit)")
    for lanes, tokens in ((1, 1), (8, 16), (8, 300), (64, 300), (1, 4096), (1, 32768)):
        _, decode, stream = best_seconds(max(rounds, 200), *decode_calls(lanes, tokens, 2, 128, 32, torch.bfloat16, 1))
        print(f"{lanes:3d} lanes of {tokens:5d} tokens {decode * 1e6:9.1f} us {stream * 1e6:9.1f} us")
    return []


def prefill_row(name: str, rounds: int, tokens: int, context: int, queries: int, head_dim: int) -> None:
    groups, dtype = 8, DTYPES[name]
    pool, table = make_pool(groups, context, head_dim, 16, dtype)
    q = torch.randn(tokens, groups, queries, head_dim).to(dtype)
    out = torch.empty_like(q)
    query_start, lane = torch.tensor([0, tokens]).int(), torch.arange(groups).int()[None]
    contexts = torch.tensor([context]).int()

    def call() -> None:
        paged_prefill(q, pool, table, query_start, lane, contexts, head_dim**-0.5, 0, out, backend="cpu")

    k, v = (
        half[table.long()].view(groups, context, head_dim).repeat_interleave(queries, 0)[None].contiguous()
        for half in pool
    )
    q_torch = q.reshape(tokens, groups * queries, head_dim).transpose(0, 1)[None].contiguous()
    position = torch.arange(context - tokens, context)
    mask = torch.arange(context) <= position[:, None] if tokens < context else None

    def torch_call() -> torch.Tensor:
        return functional.scaled_dot_product_attention(q_torch, k, v, attn_mask=mask, is_causal=mask is None)

    seconds, torch_seconds = best_seconds(rounds, [call], [torch_call])
    pairs = tokens * (context - tokens) + tokens * (tokens + 1) / 2
    flop = 4 * pairs * groups * queries * head_dim
    rates = [flop / time / 1e9 / torch.get_num_threads() for time in (seconds, torch_seconds)]
    label = f"{name} D={head_dim} M={queries} {tokens} new of {context}"
    print(f"{label:36s} {seconds * 1e3:8.2f} ms {rates[0]:7.1f} {torch_seconds * 1e3:12.2f} ms {rates[1]:7.1f}")


def bench_prefill(rounds: int) -> list[Shares]:
    print("\nprefill, 8 head groups; GFLOP/s per thread               hetis                        torch")
    for shape in [
        ("bf16", 256, 256, 2, 128),
        ("bf16", 1024, 1024, 2, 128),
        ("bf16", 2048, 2048, 2, 128),
        ("bf16", 512, 4096, 2, 128),
        ("bf16", 16, 4096, 2, 128),
        ("bf16", 1024, 1024, 4, 64),
        ("fp16", 1024, 1024, 2, 128),
        ("fp32", 1024, 1024, 2, 128),
    ]:
        name, tokens, context, queries, head_dim = shape
        prefill_row(name, min(rounds, 15), tokens, context, queries, head_dim)
    return []


BENCHES = {"decode": bench_decode, "pages": bench_pages, "small": bench_small, "prefill": bench_prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(BENCHES)} (default all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="alternating rounds (default 30)")
    parser.add_argument("--isa", default="avx512_bf16", help="portable, avx2, avx512 or avx512_bf16 (default)")
    parser.add_argument("--aim", type=float, default=0.7, help="least median share of decode (default 0.7)")
    arguments = parser.parse_args()
    if not extension.load():
        raise SystemExit("the C++ extension is not built")
    torch.set_num_threads(arguments.threads)
    print(f"{torch.ops.hetis.limit_dense_isa(arguments.isa)}, {arguments.threads} threads, torch {torch.__version__}")
    shares = [line for part in arguments.parts or BENCHES for line in BENCHES[part](arguments.rounds)]
    misses = [miss for line in shares for miss in line.misses(arguments.aim)]
    if shares:
        print(
            f"\naim {arguments.aim:.0%} of the sum or the bound: "
            + ("; ".join(["missed by", *misses]) if misses else "reached")
        )
    raise SystemExit(1 if misses else 0)


if __name__ == "__main__":
    main()
