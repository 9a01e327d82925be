"""`hetis bench` on a device, one process: a batch of 64 requests and one request alone, 256 tokens in and 128 out.

python bench/gpu/throughput.py --device cuda
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu.shapes import BY_DEVICE, write

from hetis import LLM, SamplingParams

INPUT, OUTPUT = 256, 128


def measure(directory: Path, device: str, batches: tuple[int, ...]) -> dict[str, Any]:
    begin = time.perf_counter()
    params = SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True, detokenize=False)
    with LLM(directory, device=device, load_format="dummy", max_model_len=1024, max_num_seqs=64) as llm:
        found: dict[str, Any] = {"start s": round(time.perf_counter() - begin, 1)}
        llm.generate([[7] * INPUT], SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False))
        for batch in batches:
            begin = time.perf_counter()
            llm.generate([[7 + row] * INPUT for row in range(batch)], params)
            found[f"{batch} requests, tokens/s"] = round(batch * OUTPUT / (time.perf_counter() - begin), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=list(BY_DEVICE))
    device = parser.parse_args().device
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in BY_DEVICE[device].items():
            directory = write(Path(scratch) / name, config)
            found = measure(directory, device, (64, 1) if device == "cuda" else (4, 1))
            print("RESULT " + json.dumps({f"{name} {what}": figure for what, figure in found.items()}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
