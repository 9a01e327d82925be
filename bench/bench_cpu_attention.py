"""CPU attention against the limits of the machine: decode against streaming reads, prefill against torch's attention.

Decode reads every cached byte once, so its baseline is a plain sum over the same bytes, in order, with the same
threads. Several pools are read in turn, as by a model with several layers, so that caches hold nothing of the previous
round. Pages lie in order, as the allocator hands them to sequences that arrive one after the other, or shuffled, the
worst case after long serving. Prefill is bound by arithmetic, so its baselines are FLOP/s and
`scaled_dot_product_attention` on the same, already gathered, keys and values (repeated for grouped queries, as torch's
CPU kernel requires). The two sides alternate in one process, and the best of all rounds counts for each, so that other
load on the machine disturbs both alike.

    python bench/bench_cpu_attention.py [decode|pages|small|prefill ...] [--threads N] [--rounds N] [--isa NAME]
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

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


def decode_row(
    rounds: int, name: str, queries: int, head_dim: int, page_size: int, lanes: int = 32, tokens: int = 4096
) -> None:
    num_bytes = 2 * lanes * tokens * head_dim * DTYPES[name].itemsize
    layers = max(1, 2**28 // num_bytes)
    seconds = best_seconds(rounds, *decode_calls(lanes, tokens, queries, head_dim, page_size, DTYPES[name], layers))
    in_order, shuffled, stream = (num_bytes / best / 1e9 for best in seconds)
    label = f"{name} D={head_dim} M={queries} S={page_size}"
    print(
        f"{label:28s} {num_bytes / 2**20:7.1f} MiB {stream:8.1f} GB/s"
        f" {in_order:8.1f} GB/s {in_order / stream:4.0%} {shuffled:8.1f} GB/s {shuffled / stream:4.0%}"
    )


HEADER = "        read        stream  decode, in order   decode, shuffled"


def bench_decode(rounds: int) -> None:
    print(f"\n{'decode, 32 lanes of 4096':28s}{HEADER}")
    for name, queries, head_dim in [
        *(("bf16", queries, 128) for queries in (1, 2, 4, 8)),
        *(("bf16", 2, 64), ("bf16", 2, 80)),
        *(("fp16", 2, 128), ("fp32", 2, 128), ("fp32", 2, 64)),
    ]:
        decode_row(rounds, name, queries, head_dim, 32)


def bench_pages(rounds: int) -> None:
    print(f"\n{'decode by page size':28s}{HEADER}")
    for head_dim in (128, 64):
        for page_size in (8, 16, 32, 64, 128):
            decode_row(rounds, "bf16", 2, head_dim, page_size)


def bench_small(rounds: int) -> None:
    print("\nsmall decode calls, bf16 D=128 M=2: the call, and a read of as many bytes (from the caches if they fit)")
    for lanes, tokens in ((1, 1), (8, 16), (8, 300), (64, 300), (1, 4096), (1, 32768)):
        _, decode, stream = best_seconds(max(rounds, 200), *decode_calls(lanes, tokens, 2, 128, 32, torch.bfloat16, 1))
        print(f"{lanes:3d} lanes of {tokens:5d} tokens {decode * 1e6:9.1f} us {stream * 1e6:9.1f} us")


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


def bench_prefill(rounds: int) -> None:
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


BENCHES = {"decode": bench_decode, "pages": bench_pages, "small": bench_small, "prefill": bench_prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(BENCHES)} (default all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--rounds", type=int, default=30, help="alternating rounds, of which the best counts (default 30)"
    )
    parser.add_argument("--isa", default="avx512_bf16", help="portable, avx2, avx512 or avx512_bf16 (default)")
    arguments = parser.parse_args()
    if not extension.load():
        raise SystemExit("the C++ extension is not built")
    torch.set_num_threads(arguments.threads)
    print(f"{torch.ops.hetis.limit_dense_isa(arguments.isa)}, {arguments.threads} threads, torch {torch.__version__}")
    for part in arguments.parts or BENCHES:
        BENCHES[part](arguments.rounds)


if __name__ == "__main__":
    main()
