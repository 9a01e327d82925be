"""Linear layers on the CPU: hetis's kernel, torch's plain `linear` and oneDNN's packed weights, in alternation.

    python bench/bench_linear.py                 # table over tokens for the shapes of Qwen3-0.6B
    python bench/bench_linear.py --step 1 16     # all non-attention work of a decode step, weights of all layers
    python bench/bench_linear.py --step 2048     # a prefill

Weights are used in rotation, so that each is read from memory. Figures: GB/s of weights, GFLOP/s, and the time relative
to hetis's kernel (above 1: hetis is faster). The lower quartile over the rounds counts for every candidate.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from hetis_kernels import add_rms_norm, gated_activation, qk_norm_rope
from hetis_kernels.linear import linear, pack_linear

HIDDEN, LAYERS, GROUPS, QUERIES, HEAD_DIM, COLUMNS, VOCABULARY = 1024, 28, 8, 2, 128, 3072, 151_936
QKV, ATTENTION = GROUPS * (QUERIES + 2) * HEAD_DIM, GROUPS * QUERIES * HEAD_DIM
SHAPES = [(QKV, HIDDEN), (HIDDEN, ATTENTION), (2 * COLUMNS, HIDDEN), (HIDDEN, COLUMNS)]
ROTATED_BYTES = 150e6
Layer = Callable[[torch.Tensor], torch.Tensor]


def candidates(weight: torch.Tensor, num_tokens: int) -> dict[str, Layer]:
    """Implementations of one linear layer by name, hetis's first."""
    packed = pack_linear(weight)
    ways: dict[str, Layer] = {"hetis": lambda x: linear(x, packed), "torch": lambda x: functional.linear(x, weight)}
    reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if reorder is not None and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        reordered = reorder(weight, num_tokens)
        pointwise = torch.ops.mkldnn._linear_pointwise.default
        ways["onednn packed"] = lambda x: pointwise(x, reordered, None, "none", [], "")
    return ways


def alternate(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Lower quartile of the seconds of each call; calls alternate, so that other load disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(times[1:])[(len(times) - 1) // 4] for name, times in seconds.items()}


def report(label: str, seconds: dict[str, float], num_bytes: float, flops: float) -> None:
    first = next(iter(seconds.values()))
    cells = [
        f"{name} {num_bytes / s / 1e9:6.1f} GB/s {flops / s / 1e9:5.0f} GFLOP/s x{s / first:4.2f}"
        for name, s in seconds.items()
    ]
    print(f"{label:24} {first * 1e6:9.0f} us | {' | '.join(cells)}", flush=True)


def bench_shapes(tokens: list[int], dtype: torch.dtype, rounds: int, with_head: bool) -> None:
    for num_outputs, num_inputs in [*SHAPES, *([(VOCABULARY, HIDDEN)] if with_head else [])]:
        num_bytes = num_outputs * num_inputs * dtype.itemsize
        copies = max(1, int(ROTATED_BYTES / num_bytes))
        weights = [torch.randn(num_outputs, num_inputs).mul_(0.02).to(dtype) for _ in range(copies)]
        for num_tokens in tokens:
            x = torch.randn(num_tokens, num_inputs).to(dtype)
            layers = [candidates(weight, num_tokens) for weight in weights]

            def pass_over(name: str, layers: list[dict[str, Layer]] = layers, x: torch.Tensor = x) -> None:
                for layer in layers:
                    layer[name](x)

            ways: dict[str, Callable[[], object]] = {name: partial(pass_over, name) for name in layers[0]}
            seconds = {name: s / copies for name, s in alternate(ways, rounds if num_tokens < 256 else 3).items()}
            report(
                f"{num_outputs}x{num_inputs} T={num_tokens}",
                seconds,
                num_bytes,
                2.0 * num_tokens * num_outputs * num_inputs,
            )


def bench_step(num_tokens: int, dtype: torch.dtype, rounds: int) -> None:
    """All layers and the LM head without attention; in a prefill the LM head gets one token, as in serving."""
    shapes = [shape for _ in range(LAYERS) for shape in SHAPES] + [(VOCABULARY, HIDDEN)]
    weights = [torch.empty(shape, dtype=dtype).normal_(std=0.02) for shape in shapes]
    layers = [candidates(weight, num_tokens) for weight in weights]
    norm = torch.ones(HIDDEN, dtype=dtype)
    head_norm = torch.ones(HEAD_DIM, dtype=dtype)
    table = torch.rand(num_tokens, HEAD_DIM)
    position = torch.arange(num_tokens)
    x = torch.randn(num_tokens, HIDDEN).to(dtype)
    gated = torch.empty(num_tokens, COLUMNS, dtype=dtype)
    normed = torch.empty_like(x)

    def step(name: str) -> None:
        residual = torch.zeros_like(x)
        hidden = x
        for first in range(0, 4 * LAYERS, 4):
            qkv, output, gate_up, down = (layer[name] for layer in layers[first : first + 4])
            add_rms_norm(hidden, residual, norm, 1e-6, normed)
            heads = qkv(normed)
            fused = heads.view(num_tokens, GROUPS, QUERIES + 2, HEAD_DIM)
            qk_norm_rope(fused, QUERIES, head_norm, head_norm, 1e-6, table, position)
            hidden = output(heads[:, :ATTENTION])
            add_rms_norm(hidden, residual, norm, 1e-6, normed)
            gated_activation(gate_up(normed), "silu", gated)
            hidden = down(gated)
        layers[-1][name](hidden if num_tokens <= 64 else hidden[-1:])

    ways: dict[str, Callable[[], object]] = {name: partial(step, name) for name in layers[0]}
    num_weights = sum(weight.numel() for weight in weights)
    flops = 2.0 * num_tokens * (num_weights - (VOCABULARY * HIDDEN if num_tokens > 64 else 0))
    report(f"step T={num_tokens}", alternate(ways, rounds), float(num_weights * dtype.itemsize), flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048])
    parser.add_argument("--step", type=int, nargs="+", help="whole steps of so many tokens, instead of the table")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--head", action="store_true", help="include the LM head (311 MB in bfloat16)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    with torch.inference_mode():
        if arguments.step:
            for num_tokens in arguments.step:
                bench_step(num_tokens, dtype, arguments.rounds if num_tokens < 256 else 2)
        else:
            bench_shapes(arguments.tokens, dtype, arguments.rounds, arguments.head)


if __name__ == "__main__":
    main()
