"""Models without weight files: speed does not depend on the values of weights."""

import json
from pathlib import Path
from typing import Literal

import msgspec


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A Llama model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_head_groups: int
    queries_per_group: int
    head_dim: int
    vocab_size: int
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_head_groups * self.head_dim * self._value_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes that a decode step reads: all layers and the LM head."""
        heads = self.num_head_groups * (2 * self.queries_per_group + 2)
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)
        return (self.num_layers * layer + self.hidden_size * self.vocab_size) * self._value_bytes

    @property
    def _value_bytes(self) -> int:
        return {"float32": 4, "bfloat16": 2}[self.dtype]

    def write(self, directory: Path) -> Path:
        """Writes the config.json, which is all that `load_format="dummy"` needs; returns the directory."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_head_groups * self.queries_per_group,
            "num_key_value_heads": self.num_head_groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "dtype": self.dtype,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        (directory / "config.json").write_text(json.dumps(config))
        return directory
