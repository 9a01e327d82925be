"""Keys of config.json that describe a decoder, as typed structures: one per architecture with keys of its own.

Defaults for absent keys are those of transformers. Keys without effect on the computation are not listed.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from hetis.models.json_files import (
    Count,
    Flag,
    OptionalCount,
    OptionalNumber,
    OptionalObject,
    OptionalText,
    OptionalTexts,
)

_MAX_LAYERS = 10_000  # far above any model; a wrong value must not become a list that fills the memory

Layers = Annotated[int, Meta(ge=1, le=_MAX_LAYERS, description=f"a whole number from 1 to {_MAX_LAYERS}")]
LayerIndex = Annotated[int, Meta(ge=0, le=_MAX_LAYERS, description=f"a whole number from 0 to {_MAX_LAYERS}")]
Epsilon = Annotated[float, Meta(ge=0, lt=1, description="a number from 0 to below 1, without quotes")]
Activation = Annotated[
    Literal["silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh"],
    Meta(description="one of silu, swish, relu, gelu, gelu_new, gelu_pytorch_tanh: no other activation is supported"),
]
OptionalDtype = Annotated[
    Literal["float32", "bfloat16", "float16", "torch.float32", "torch.bfloat16", "torch.float16"] | None,
    Meta(description="one of float32, bfloat16, float16, or null: no other dtype is supported"),
]
LayerTypes = Annotated[
    list[Literal["full_attention", "sliding_attention"]] | None,
    Meta(description="null, or a list of full_attention and sliding_attention: no other attention is supported"),
]


class IdentityKeys(msgspec.Struct, frozen=True, kw_only=True):
    """Keys that identify the architecture."""

    model_type: OptionalText = None
    architectures: OptionalTexts = None


class DecoderKeys(msgspec.Struct, frozen=True, kw_only=True):
    """Keys of all architectures, with Llama's names and defaults; subclasses override those that differ."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: OptionalCount = None  # null: as many as num_attention_heads
    head_dim: OptionalCount = None  # null: hidden_size / num_attention_heads
    vocab_size: Count
    max_position_embeddings: Count = 2048
    hidden_act: Activation = "silu"
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: Flag = False
    dtype: OptionalDtype = None
    torch_dtype: OptionalDtype = None  # before transformers 5
    attention_bias: Flag = False
    mlp_bias: Flag = False
    rope_theta: OptionalNumber = None
    rope_scaling: OptionalObject = None  # before transformers 5
    rope_parameters: OptionalObject = None
    original_max_position_embeddings: OptionalCount = None
    partial_rotary_factor: OptionalNumber = None

    def windows(self) -> tuple[int, ...]:
        """Newest tokens that a query sees, per layer; 0: all. Raises ValueError for keys that contradict each other."""
        return (0,) * self.num_hidden_layers

    def check(self) -> None:
        """Raises ValueError, one sentence, for settings that the architecture allows and hetis does not support."""


class MistralKeys(DecoderKeys, frozen=True, kw_only=True):
    num_key_value_heads: OptionalCount = 8
    max_position_embeddings: Count = 131072
    sliding_window: OptionalCount = 4096

    def windows(self) -> tuple[int, ...]:
        """The same window in every layer, or none if `sliding_window` is null."""
        return (self.sliding_window or 0,) * self.num_hidden_layers


class Qwen2Keys(DecoderKeys, frozen=True, kw_only=True):
    num_key_value_heads: OptionalCount = 32
    max_position_embeddings: Count = 32768
    use_sliding_window: Flag = False
    sliding_window: OptionalCount = 4096
    max_window_layers: LayerIndex = 28
    layer_types: LayerTypes = None

    def windows(self) -> tuple[int, ...]:
        """Windows by `layer_types` if given; else in layers from `max_window_layers` on, if `use_sliding_window`."""
        window = self.sliding_window if self.use_sliding_window else None
        first, num_layers = self.max_window_layers, self.num_hidden_layers
        kinds = self.layer_types or [
            "sliding_attention" if window and layer >= first else "full_attention" for layer in range(num_layers)
        ]
        if len(kinds) != num_layers:
            raise ValueError(
                f"layer_types has {len(kinds)} entries and num_hidden_layers is {num_layers}; there must be one per "
                f"layer."
            )
        if "sliding_attention" in kinds and not window:
            raise ValueError(
                "layer_types has sliding_attention, but no window is in use; set use_sliding_window to true and "
                "sliding_window to a number of tokens."
            )
        return tuple(int(window or 0) if kind == "sliding_attention" else 0 for kind in kinds)


class Qwen3Keys(Qwen2Keys, frozen=True, kw_only=True):
    head_dim: OptionalCount = 128


class OptKeys(DecoderKeys, frozen=True, kw_only=True):
    intermediate_size: Count = msgspec.field(name="ffn_dim")
    hidden_act: Activation = msgspec.field(name="activation_function", default="relu")
    tie_word_embeddings: Flag = True
    enable_bias: Flag = True
    word_embed_proj_dim: OptionalCount = None  # null: hidden_size

    def check(self) -> None:
        width = self.word_embed_proj_dim or self.hidden_size
        if width != self.hidden_size:
            raise ValueError(
                f"word_embed_proj_dim is {width} and hidden_size {self.hidden_size}: layers that project in and out of "
                f"a narrower embedding (as in opt-350m) are not supported; use another size of the family."
            )
