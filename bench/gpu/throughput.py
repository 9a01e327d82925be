"""Output tokens/s on a device, plan 1+0: one request alone and a batch of 64, 256 tokens in and 128 out.

python bench/gpu/throughput.py --device cuda
"""

import time
from collections.abc import Iterator
from pathlib import Path

from gpu.shapes import Figures, measure_each_model

from hetis import LLM, SamplingParams

INPUT, OUTPUT = 256, 128


def measure(directory: Path, device: str, batches: tuple[int, ...]) -> Iterator[Figures]:
    begin = time.perf_counter()
    params = SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True, detokenize=False)
    with LLM(directory, device=device, load_format="dummy", max_model_len=1024, max_num_seqs=64) as llm:
        yield {"start s": round(time.perf_counter() - begin, 1)}
        llm.generate([[7] * INPUT], SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False))
        for batch in batches:
            begin = time.perf_counter()
            llm.generate([[7 + row] * INPUT for row in range(batch)], params)
            yield {f"{batch} requests, tokens/s": round(batch * OUTPUT / (time.perf_counter() - begin), 1)}


if __name__ == "__main__":
    measure_each_model(__doc__, measure)
