"""Tensor names of checkpoints, and the names and shapes of all tensors of a model."""

from typing import NamedTuple

from hetis.core.model_spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


class TensorNames(NamedTuple):
    """Module names in a checkpoint: full names outside of layers, names relative to `layer` inside."""

    embedding: str
    positions: str
    final_norm: str
    head: str
    layer: str  # prefix with {layer}
    attention_norm: str
    query: str
    key: str
    value: str
    query_norm: str
    key_norm: str
    output: str
    mlp_norm: str
    gate: str
    up: str
    down: str


LLAMA_NAMES = TensorNames(
    embedding="model.embed_tokens",
    positions="",
    final_norm="model.norm",
    head="lm_head",
    layer="model.layers.{layer}.",
    attention_norm="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)

OPT_NAMES = LLAMA_NAMES._replace(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    final_norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{layer}.",
    attention_norm="self_attn_layer_norm",
    output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    up="fc1",
    down="fc2",
)


def expected_tensors(spec: ModelSpec, names: TensorNames) -> Shapes:
    """Name and shape of every tensor of the whole model, as a checkpoint holds them."""
    hidden, columns = spec.hidden_size, spec.intermediate_size
    query_rows, key_rows = spec.num_query_heads * spec.head_dim, spec.num_head_groups * spec.head_dim
    shapes: Shapes = {}

    def module(name: str, *shape: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    has_norm_bias = spec.norm == "layer"
    module(names.embedding, spec.vocab_size, hidden)
    if spec.learned_position_offset is not None:
        module(names.positions, spec.max_position + spec.learned_position_offset, hidden)
    if not spec.tied_embeddings:
        module(names.head, spec.vocab_size, hidden)
    module(names.final_norm, hidden, bias=has_norm_bias)
    for index in range(spec.num_layers):
        prefix = names.layer.format(layer=index)
        module(prefix + names.attention_norm, hidden, bias=has_norm_bias)
        module(prefix + names.mlp_norm, hidden, bias=has_norm_bias)
        module(prefix + names.query, query_rows, hidden, bias=spec.qkv_bias)
        module(prefix + names.key, key_rows, hidden, bias=spec.qkv_bias)
        module(prefix + names.value, key_rows, hidden, bias=spec.qkv_bias)
        module(prefix + names.output, hidden, query_rows, bias=spec.output_bias)
        if spec.qk_norm:
            module(prefix + names.query_norm, spec.head_dim)
            module(prefix + names.key_norm, spec.head_dim)
        if spec.gated:
            module(prefix + names.gate, columns, hidden, bias=spec.mlp_bias)
        module(prefix + names.up, columns, hidden, bias=spec.mlp_bias)
        module(prefix + names.down, hidden, columns, bias=spec.mlp_bias)
    return shapes
