"""Measures one engine, in the environment of that engine: the child of bench_peers.py.

    python child.py '{"kind": "vllm", "model": "...", "options": {...}, "began": 0.0, "lengths": [16, 256, 64, 4096]}'

Each engine is a function that loads a model and returns a function from prompts (token ids) and a number of tokens,
which are generated greedily and without an end token, to the number of tokens of each output.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[int]]


def hetis(model: str, options: dict[str, Any]) -> Generate:
    from hetis import LLM, SamplingParams

    llm = LLM(model, **options)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[int]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False)
        outs = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        return [len(out.outputs[0].token_ids) for out in outs]

    return generate


def vllm(model: str, options: dict[str, Any]) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(model, **options)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[int]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False)
        outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [len(out.outputs[0].token_ids) for out in outs]

    return generate


def openvino(model: str, options: dict[str, Any]) -> Generate:
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    for name, value in options["scheduler"].items():
        setattr(scheduler, name, value)
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", options["plugin"])

    def generate(prompts: list[list[int]], num_tokens: int) -> list[int]:
        config = openvino_genai.GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
        inputs = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        found = pipeline.generate(inputs, [config] * len(prompts))
        return [len(result.m_generation_ids[0]) for result in found]

    return generate


ENGINES = {"hetis": hetis, "vllm": vllm, "openvino": openvino}


def main() -> None:
    asked = json.loads(sys.argv[1])
    num_prompts, input_len, output_len, long_len = asked["lengths"]
    draw = random.Random(0)

    def prompts_of(count: int, length: int) -> list[list[int]]:
        return [[draw.randrange(100, 150_000) for _ in range(length)] for _ in range(count)]

    def timed(prompts: list[list[int]], num_tokens: int) -> float:
        begin = time.perf_counter()
        lengths = generate(prompts, num_tokens)
        assert lengths == [num_tokens] * len(prompts), lengths
        return time.perf_counter() - begin

    generate = ENGINES[asked["kind"]](asked["model"], asked["options"])
    timed(prompts_of(1, input_len), 1)
    found = {"first_token_s": time.time() - asked["began"]}
    timed(prompts_of(num_prompts, input_len), 2)  # touches memory, which on virtual machines takes a second or more
    found["batch_tok_s"] = num_prompts * output_len / timed(prompts_of(num_prompts, input_len), output_len)
    single = prompts_of(2, input_len)
    prompt_seconds = timed(single[:1], 1)
    seconds = timed(single[1:], output_len)
    found["single_tok_s"] = output_len / seconds
    found["decode_tok_s"] = (output_len - 1) / (seconds - prompt_seconds)
    if long_len:
        found["long_prompt_s"] = timed(prompts_of(1, long_len), 1)
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
