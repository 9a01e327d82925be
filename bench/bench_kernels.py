"""Memory bandwidth of the Triton kernels, compared with a plain copy on the same GPU; needs a CUDA device.

    python bench/bench_kernels.py [--dtype bfloat16] [--output FILE]

Prints a table and appends its rows to a file (bench/results/kernels.jsonl), keyed by commit, device and shape. Times
are medians of 30 runs, each after the caches were overwritten. Prefill is bound by arithmetic: it is given in TFLOP/s.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from gpu.report import commit

import hetis_kernels as hk

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
PAGE_SIZE = 16


class Case(NamedTuple):
    """One call, the bytes it must move and the floating-point operations it must do."""

    name: str
    shape: str
    call: Callable[[], None]
    num_bytes: float
    num_flops: float = 0.0


@dataclass(frozen=True)
class Row:
    commit: str
    device: str
    dtype: str
    name: str
    shape: str
    time_us: float
    bandwidth_gb_s: float
    share_of_copy: float
    tflop_s: float


def paged_lanes(num_lanes: int, length: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool that the lanes fill exactly, and their page table with pages in random order."""
    num_pages = -(-length // PAGE_SIZE)
    pool = torch.randn(2, num_lanes * num_pages, PAGE_SIZE, head_dim, dtype=dtype)
    return pool, torch.randperm(num_lanes * num_pages).int().view(num_lanes, num_pages)


def decode_cases(dtype: torch.dtype) -> Iterator[Case]:
    for num_lanes, length, num_queries, head_dim in (
        *((32, 4096, m, 128) for m in (1, 4, 8)),
        *((32, 4096, 4, d) for d in (64, 80)),
        (256, 512, 4, 128),
        (8, 65536, 4, 128),
        (1024, 64, 4, 128),
    ):
        pool, table = paged_lanes(num_lanes, length, head_dim, dtype)
        q = torch.randn(num_lanes, num_queries, head_dim, dtype=dtype)
        out = torch.empty_like(q)
        lanes = torch.randperm(num_lanes).int()
        lengths = torch.full((num_lanes,), length).int()

        def decode(arguments: Any = (q, pool, table, lanes, lanes, lengths, 0.1, 0, out)) -> None:
            hk.paged_decode(*arguments)

        shape = f"U={num_lanes} length={length} M={num_queries} D={head_dim}"
        yield Case("paged_decode", shape, decode, pool.nbytes + 2 * q.nbytes)


def prefill_cases(dtype: torch.dtype) -> Iterator[Case]:
    for num_chunks, length, num_queries, head_dim in ((4, 2048, 4, 128), (1, 8192, 4, 128), (16, 512, 2, 64)):
        pool, table = paged_lanes(8 * num_chunks, length, head_dim, dtype)
        q = torch.randn(num_chunks * length, 8, num_queries, head_dim, dtype=dtype)
        out = torch.empty_like(q)
        start = torch.arange(num_chunks + 1).int() * length
        lanes = torch.arange(8 * num_chunks).int().view(num_chunks, 8)
        context = torch.full((num_chunks,), length).int()

        def prefill(arguments: Any = (q, pool, table, start, lanes, context, 0.1, 0, out)) -> None:
            hk.paged_prefill(*arguments)

        shape = f"C={num_chunks} length={length} G=8 M={num_queries} D={head_dim}"
        num_flops = 2.0 * num_chunks * length**2 * 8 * num_queries * head_dim  # half of the scores are masked
        yield Case("paged_prefill", shape, prefill, 2 * q.nbytes + pool.nbytes, num_flops)


def copy_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Kernels that move vectors and pages: 4096 tokens of 8 head groups of 4 + 2 heads, and 512 pages of 32 layers."""
    qkv = torch.randn(4096, 8, 6, 128, dtype=dtype)
    vectors = qkv.view(4096 * 8, 768)
    index = torch.randperm(vectors.shape[0]).int()
    pool = torch.empty(2, 4096, PAGE_SIZE, 128, dtype=dtype)
    cells = torch.randperm(4096 * PAGE_SIZE)[: vectors.shape[0]]
    k, v = qkv.view(-1, 6, 128)[:, 4], qkv.view(-1, 6, 128)[:, 5]
    yield Case("kv_append", "A=32768 D=128", lambda: hk.kv_append(k, v, pool, index, cells), 4 * k.numel() * k.itemsize)
    packed = torch.empty_like(vectors)
    yield Case("lane_pack", "U=32768 F=768", lambda: hk.lane_pack(vectors, index, packed), 2 * vectors.nbytes)
    yield Case("lane_unpack", "U=32768 F=768", lambda: hk.lane_unpack(packed, index, vectors), 2 * vectors.nbytes)
    layers = torch.empty(32, 2, 1024, PAGE_SIZE, 128, dtype=dtype)
    pages, buffer = torch.randperm(1024)[:512].int(), torch.empty(512, 32, 2, PAGE_SIZE, 128, dtype=dtype)
    yield Case("page_gather", "N=512 L=32", lambda: hk.page_gather(layers, pages, buffer), 2 * buffer.nbytes)
    yield Case("page_scatter", "N=512 L=32", lambda: hk.page_scatter(buffer, pages, layers), 2 * buffer.nbytes)
    angles, position = torch.randn(4096, 128), torch.arange(4096)
    weight = torch.ones(128, dtype=dtype)
    rope = (qkv, 4, weight, weight, 1e-6, angles, position)
    yield Case("qk_norm_rope", "T=4096 G=8 M=4 D=128", lambda: hk.qk_norm_rope(*rope), 2 * qkv.nbytes * 5 / 6)


def dense_cases(dtype: torch.dtype) -> Iterator[Case]:
    x, residual, weight = torch.randn(4096, 4096, dtype=dtype), torch.randn(4096, 4096, dtype=dtype), torch.ones(4096)
    weight = weight.to(dtype)
    out = torch.empty_like(x)
    yield Case("rms_norm", "T=4096 H=4096", lambda: hk.rms_norm(x, weight, 1e-6, out), 2 * x.nbytes)
    add = (x, residual, weight, 1e-6, out)
    yield Case("add_rms_norm", "T=4096 H=4096", lambda: hk.add_rms_norm(*add), 4 * x.nbytes)
    gate_up, gated = torch.randn(4096, 2 * 14336, dtype=dtype), torch.empty(4096, 14336, dtype=dtype)
    call = lambda: hk.gated_activation(gate_up, "silu", gated)  # noqa: E731
    yield Case("gated_activation", "T=4096 F=14336", call, gate_up.nbytes + gated.nbytes)


def seconds(call: Callable[[], object], rounds: int = 30) -> float:
    """Median time on the device; the second-level cache is overwritten before each run."""
    flush = torch.empty(256 << 20, dtype=torch.uint8)
    times: list[float] = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times[3:])


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a 1 GiB copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="file that rows are appended to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels: there is no CUDA device here, and Triton kernels are measured on one only.")
    torch.set_default_device("cuda")
    dtype = getattr(torch, arguments.dtype)
    device = torch.cuda.get_device_name()
    copy = copy_bandwidth()
    print(f"{device}, {arguments.dtype}, copy of 1 GiB: {copy / 1e9:.0f} GB/s")
    for cases in (decode_cases, prefill_cases, copy_cases, dense_cases):
        for case in cases(dtype):
            time = seconds(case.call)
            bandwidth = case.num_bytes / time
            row = Row(
                commit=commit() or "",
                device=device,
                dtype=arguments.dtype,
                name=case.name,
                shape=case.shape,
                time_us=round(time * 1e6, 1),
                bandwidth_gb_s=round(bandwidth / 1e9, 1),
                share_of_copy=round(bandwidth / copy, 3),
                tflop_s=round(case.num_flops / time / 1e12, 1),
            )
            figure = f"{row.tflop_s:7.1f} TFLOP/s" if case.num_flops else f"{row.bandwidth_gb_s:7.1f} GB/s"
            print(f"{row.name:18}{row.shape:32}{row.time_us:10.1f} us {figure:>16} {row.share_of_copy:6.0%} of copy")
            with arguments.output.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
