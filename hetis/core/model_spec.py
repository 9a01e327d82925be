"""Architecture of a decoder as data: sizes, norms, position encoding, attention windows; no values of weights."""

from typing import Literal, cast

import msgspec

Dtype = Literal["float32", "bfloat16", "float16"]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding (halves rotated, as in Llama). `scaling` names the correction of frequencies.

    Dynamic NTK scaling needs none: with a fixed table it is a larger `theta`.
    """

    theta: float
    rotary_dim: int
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position: int = 0  # llama3, yarn: the length before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations within the original length above which a frequency stays
    beta_slow: float = 1.0  # yarn: rotations below which it is divided by `factor`
    truncate: bool = True  # yarn: the ramp between both begins and ends at whole pairs
    attention_factor: float = 1.0  # yarn: cosines and sines are multiplied by it


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder-only transformer. A new architecture is a new set of values, not a new class."""

    family: str  # `model_type` of Hugging Face: selects tensor names in models/families.py; no code branches on it
    num_layers: int
    hidden_size: int
    num_query_heads: int
    num_head_groups: int  # KV heads; a head group is one KV head with the query heads that share it
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int  # most tokens of a sequence, with what rope scaling adds
    dtype: Dtype  # of the checkpoint
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    qk_norm: bool = False  # RMS norm of each query and key head before rope (Qwen3)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    rope: RopeSpec | None = None
    learned_position_offset: int | None = None  # of a learned position table, read at position + offset (OPT: 2)
    tied_embeddings: bool = False
    windows: tuple[int, ...] = ()  # per layer: newest tokens that a query sees, its own included; 0: all

    @property
    def queries_per_group(self) -> int:
        """M, the query heads that share one KV head."""
        return self.num_query_heads // self.num_head_groups

    @property
    def heads_per_group(self) -> int:
        """M + 2, the vectors that QKV projects per head group: M queries, key, value."""
        return self.queries_per_group + 2

    @property
    def gate_factor(self) -> int:
        """2 when the MLP has a gate beside the up projection, else 1."""
        return 2 if self.gated else 1

    @property
    def attention_scale(self) -> float:
        """Factor of q.k before the softmax: D ** -0.5."""
        return float(self.head_dim**-0.5)

    def kv_bytes_per_token(self, num_layers: int, dtype: str) -> int:
        """Bytes of K and V of one token of one lane in `num_layers` layers."""
        return num_layers * 2 * self.head_dim * DTYPE_BYTES[dtype]


def resolve_dtype(dtype: str, spec: ModelSpec) -> Dtype:
    """The dtype to run in; "auto" is the checkpoint's. Raises ValueError for a name that is not supported."""
    resolved = spec.dtype if dtype == "auto" else dtype
    if resolved not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPE_BYTES)}.")
    return cast(Dtype, resolved)
