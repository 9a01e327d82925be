"""Fleets of processes on a device: greedy tokens of the small model, without and with a CPU worker, equal the CPU's.

python bench/gpu/generate.py --device cuda
"""

import argparse
import json
from typing import Any

from hetis import LLM, SamplingParams

PROMPTS = ["The function", "if x is None:", "It was the best of times"]


def tokens(**options: Any) -> list[list[int]]:
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    with LLM(dtype="float32", kv_cache_memory="64MiB", dispatch="even", **options) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    expected = tokens(device="cpu", plan="1+0")
    alone: dict[str, Any] = {"stages": [{"primaries": [{"device": device}]}]}
    plans = {"1+0": alone, "1+1": alone | {"attention": [{"device": "cpu"}]}}
    for name, plan in plans.items():
        same = tokens(plan=plan) == expected
        print("RESULT " + json.dumps({f"{name} on {device} equals the CPU": same}), flush=True)
        assert same


if __name__ == "__main__":
    main()
