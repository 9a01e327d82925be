"""Linear layers on the CPU: hetis's kernel, torch's plain `linear` and oneDNN's packed weights, in alternation.

    python bench/bench_linear.py                 # table over tokens for the shapes of Qwen3-0.6B
    python bench/bench_linear.py --step 1 16     # all non-attention work of a decode step, weights of all layers
    python bench/bench_linear.py --step 2048     # a prefill
    python bench/bench_linear.py --isa avx2      # as on processors without AVX-512, hetis alone

Weights are used in rotation, so that each is read from memory. Figures: GB/s of weights, GFLOP/s, and the time relative
to hetis's kernel (above 1: hetis is faster); then, in the same alternation, a plain sum over the same memory. The lower
quartile over the rounds counts for every candidate.

Aims: up to 16 tokens, 80 % of the sum's rate or 90 % of the GEMM rate, whichever is lower; from 256 tokens on, 95 % of
oneDNN's rate. The GEMM rate is the best that any candidate has for 1,024 tokens in this run. Exit status 1: missed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in fleets: huge pages for every candidate

import torch
from torch.nn import functional

from hetis_kernels import add_rms_norm, extension, gated_activation, qk_norm_rope
from hetis_kernels.linear import linear, pack_linear

HIDDEN, LAYERS, GROUPS, QUERIES, HEAD_DIM, COLUMNS, VOCABULARY = 1024, 28, 8, 2, 128, 3072, 151_936
QKV, ATTENTION = GROUPS * (QUERIES + 2) * HEAD_DIM, GROUPS * QUERIES * HEAD_DIM
SHAPES = [(QKV, HIDDEN), (HIDDEN, ATTENTION), (2 * COLUMNS, HIDDEN), (HIDDEN, COLUMNS)]
ROTATED_BYTES = 150e6
FEW_TOKENS, MANY_TOKENS, GEMM_TOKENS = 16, 256, 1024
OF_SUM, OF_GEMM, OF_ONEDNN = 0.80, 0.90, 0.95
HETIS, TORCH, ONEDNN, SUM = "hetis", "torch", "onednn packed", "sum"
Layer = Callable[[torch.Tensor], object]


def candidates(weight: torch.Tensor, num_tokens: int, peers: Sequence[str]) -> dict[str, Layer]:
    """Implementations of one linear layer by name, hetis's and `peers`, and the sum over hetis's packed weight."""
    packed = pack_linear(weight)
    ways: dict[str, Layer] = {
        HETIS: lambda x: linear(x, packed),
        SUM: lambda x: torch.ops.hetis.stream_read(packed.weight),
    }
    if TORCH in peers:
        ways[TORCH] = lambda x: functional.linear(x, weight)
    if ONEDNN in peers:
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, num_tokens)
        pointwise = torch.ops.mkldnn._linear_pointwise.default
        ways[ONEDNN] = lambda x: pointwise(x, reordered, None, "none", [], "")
    return ways


def find_peers(dtype: torch.dtype) -> list[str]:
    is_packed = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [TORCH, ONEDNN] if is_packed else [TORCH]


def alternate(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Lower quartile of the seconds of each call; calls alternate, so that other load disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(times[1:])[(len(times) - 1) // 4] for name, times in seconds.items()}


def report(
    label: str, num_tokens: int, seconds: dict[str, float], num_bytes: float, flops: float, gemm_rate: float
) -> bool:
    """Prints a line; whether hetis reaches its aim. `gemm_rate`: FLOP/s."""
    own = seconds[HETIS]
    cells = [
        f"{name} {num_bytes / s / 1e9:5.1f} GB/s {flops / s / 1e9:4.0f} GFLOP/s x{s / own:4.2f}"
        for name, s in seconds.items()
        if name != SUM
    ]
    of_sum, of_gemm = seconds[SUM] / own, flops / own / gemm_rate
    cells.append(f"sum {num_bytes / seconds[SUM] / 1e9:5.1f} GB/s: {of_sum:4.2f} of it, {of_gemm:4.2f} of GEMM")
    reached = True
    if num_tokens <= FEW_TOKENS:
        reached = of_sum >= OF_SUM or of_gemm >= OF_GEMM
    elif num_tokens >= MANY_TOKENS and ONEDNN in seconds:
        reached = seconds[ONEDNN] / own >= OF_ONEDNN
    print(f"{label:22} {own * 1e6:8.0f} us | {' | '.join(cells)}{'' if reached else ' MISSED'}", flush=True)
    return reached


def measure_shape(weights: list[torch.Tensor], num_tokens: int, rounds: int, peers: Sequence[str]) -> dict[str, float]:
    """Seconds per layer of each candidate, over different weights of one shape."""
    x = torch.randn(num_tokens, weights[0].shape[1]).to(weights[0].dtype)
    layers = [candidates(weight, num_tokens, peers) for weight in weights]

    def pass_over(name: str) -> None:
        for layer in layers:
            layer[name](x)

    ways: dict[str, Callable[[], object]] = {name: partial(pass_over, name) for name in layers[0]}
    return {name: s / len(weights) for name, s in alternate(ways, rounds if num_tokens < MANY_TOKENS else 3).items()}


def bench_shapes(tokens: list[int], dtype: torch.dtype, rounds: int, with_head: bool, peers: Sequence[str]) -> bool:
    """Whether all lines reach their aims."""
    reached = True
    for num_outputs, num_inputs in [*SHAPES, *([(VOCABULARY, HIDDEN)] if with_head else [])]:
        num_bytes, flops = num_outputs * num_inputs * dtype.itemsize, 2.0 * num_outputs * num_inputs
        copies = max(1, int(ROTATED_BYTES / num_bytes))
        weights = [torch.randn(num_outputs, num_inputs).mul_(0.02).to(dtype) for _ in range(copies)]
        gemm_rate = best_gemm_rate(weights[:2], rounds, peers)
        for num_tokens in tokens:
            seconds = measure_shape(weights, num_tokens, rounds, peers)
            label = f"{num_outputs}x{num_inputs} T={num_tokens}"
            reached &= report(label, num_tokens, seconds, num_bytes, flops * num_tokens, gemm_rate)
    return reached


def best_gemm_rate(weights: list[torch.Tensor], rounds: int, peers: Sequence[str]) -> float:
    """FLOP/s of the fastest candidate for many tokens."""
    seconds = measure_shape(weights, GEMM_TOKENS, rounds, peers)
    return 2.0 * weights[0].numel() * GEMM_TOKENS / min(s for name, s in seconds.items() if name != SUM)


def bench_step(num_tokens: int, dtype: torch.dtype, rounds: int, peers: Sequence[str]) -> bool:
    """All layers and the LM head without attention; in a prefill the LM head gets one token, as in serving.

    Returns whether the aim is reached.
    """
    shapes = [shape for _ in range(LAYERS) for shape in SHAPES] + [(VOCABULARY, HIDDEN)]
    weights = [torch.empty(shape, dtype=dtype).normal_(std=0.02) for shape in shapes]
    gemm_rate = best_gemm_rate([weights[2], weights[6]], rounds, peers)
    layers = [candidates(weight, num_tokens, peers) for weight in weights]
    norm = torch.ones(HIDDEN, dtype=dtype)
    head_norm = torch.ones(HEAD_DIM, dtype=dtype)
    table = torch.rand(num_tokens, HEAD_DIM)
    position = torch.arange(num_tokens)
    x = torch.randn(num_tokens, HIDDEN).to(dtype)
    gated = torch.empty(num_tokens, COLUMNS, dtype=dtype)
    normed = torch.empty_like(x)

    def step(name: str) -> None:
        if name == SUM:
            for layer in layers:
                layer[SUM](x)
            return
        residual = torch.zeros_like(x)
        hidden: torch.Tensor = x
        for first in range(0, 4 * LAYERS, 4):
            qkv, output, gate_up, down = (layer[name] for layer in layers[first : first + 4])
            add_rms_norm(hidden, residual, norm, 1e-6, normed)
            heads: torch.Tensor = qkv(normed)  # type: ignore[assignment]
            fused = heads.view(num_tokens, GROUPS, QUERIES + 2, HEAD_DIM)
            qk_norm_rope(fused, QUERIES, head_norm, head_norm, 1e-6, table, position)
            hidden = output(heads[:, :ATTENTION])  # type: ignore[assignment]
            add_rms_norm(hidden, residual, norm, 1e-6, normed)
            gated_activation(gate_up(normed), "silu", gated)  # type: ignore[arg-type]
            hidden = down(gated)  # type: ignore[assignment]
        layers[-1][name](hidden if num_tokens <= 64 else hidden[-1:])

    ways: dict[str, Callable[[], object]] = {name: partial(step, name) for name in layers[0]}
    num_weights = sum(weight.numel() for weight in weights)
    flops = 2.0 * num_tokens * (num_weights - (VOCABULARY * HIDDEN if num_tokens > 64 else 0))
    seconds = alternate(ways, rounds)
    return report(f"step T={num_tokens}", num_tokens, seconds, float(num_weights * dtype.itemsize), flops, gemm_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 1024, 2048])
    parser.add_argument("--step", type=int, nargs="+", help="whole steps of so many tokens, instead of the table")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--isa", default="avx512_bf16", choices=["avx2", "avx512", "avx512_bf16"], help="at most this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--head", action="store_true", help="include the LM head (311 MB in bfloat16)")
    arguments = parser.parse_args()
    assert extension.load(), extension.problem()
    torch.set_num_threads(arguments.threads)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    used = torch.ops.hetis.limit_dense_isa(arguments.isa)
    peers = find_peers(dtype) if arguments.isa == "avx512_bf16" else []  # whose instruction set cannot be limited
    print(f"{used}, {arguments.dtype}, {arguments.threads} threads; lower quartiles of {arguments.rounds} rounds")
    with torch.inference_mode():
        if arguments.step:
            rounds = [arguments.rounds if tokens < MANY_TOKENS else 2 for tokens in arguments.step]
            aims = [
                bench_step(tokens, dtype, count, peers) for tokens, count in zip(arguments.step, rounds, strict=True)
            ]
            reached = all(aims)
        else:
            reached = bench_shapes(arguments.tokens, dtype, arguments.rounds, arguments.head, peers)
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
