"""Shapes of models for checks on a GPU: a config.json with random weights is a model."""

import json
from pathlib import Path
from typing import Any

from bench_vs_vllm import CONFIG as QWEN3_0_6B

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
# for a rehearsal on a CPU
TINY = QWEN3_0_6B | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 4096}
TINY |= {"bos_token_id": 1, "eos_token_id": 2}

BY_DEVICE = {"cuda": {"qwen3-0.6b": QWEN3_0_6B, "llama3-8b": LLAMA3_8B}, "cpu": {"tiny": TINY}}


def write(directory: Path, config: dict[str, Any]) -> Path:
    """A directory that is a model for `--load-format dummy`."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory
