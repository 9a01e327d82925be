"""Model shapes for checks on a GPU, which use random weights."""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoint import CONFIG as QWEN3_0_6B

LLAMA3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
# for a dry run on a CPU
TINY = QWEN3_0_6B | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 4096}
TINY |= {"bos_token_id": 1, "eos_token_id": 2}

MODELS = {"cuda": {"qwen3-0.6b": QWEN3_0_6B, "llama3-8b": LLAMA3_8B}, "cpu": {"tiny": TINY}}
BATCHES = {"cuda": (1, 64), "cpu": (1, 4)}
Figures = dict[str, Any]


def measure_each_model(doc: str | None, measure: Callable[[Path, str, tuple[int, ...]], Iterator[Figures]]) -> None:
    """Command line of a check: calls `measure(directory, device, batch sizes)` for each model of `--device`.

    The directory has a config.json, enough for `load_format="dummy"`. Figures are printed as soon as they are known.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=list(MODELS))
    device = parser.parse_args().device
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in MODELS[device].items():
            directory = Path(scratch) / name
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps(config))
            for found in measure(directory, device, BATCHES[device]):
                print("RESULT " + json.dumps({f"{name} {what}": figure for what, figure in found.items()}), flush=True)
