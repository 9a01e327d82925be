"""Translation of a Hugging Face config.json into a `ModelSpec`, without code from the checkpoint.

Each supported architecture is one entry of `FAMILIES`. Settings that its entry does not cover are refused, not guessed.
"""

from pathlib import Path

import msgspec

from hetis.core.model_spec import ModelSpec
from hetis.models.config_keys import DecoderKeys, IdentityKeys, MistralKeys, OptKeys, Qwen2Keys, Qwen3Keys
from hetis.models.json_files import Json, decode, read_object, shown
from hetis.models.rope import read_rope
from hetis.models.tensor_names import LLAMA_NAMES, OPT_NAMES, TensorNames


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One architecture: the keys of its config.json, the settings that it fixes, and its tensor names."""

    architecture: str
    keys: type[DecoderKeys] = DecoderKeys
    names: TensorNames = LLAMA_NAMES
    fixed: Json = {}  # ModelSpec fields that the architecture fixes
    only: Json = {}  # keys of which only this value is supported; they may be absent
    biases: dict[str, str] = {}  # ModelSpec bias field -> key of config.json


_ATTENTION_BIASES = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        only={"rope_interleaved": False},
        biases=_ATTENTION_BIASES | {"mlp_bias": "mlp_bias"},
    ),
    "mistral": Family(architecture="MistralForCausalLM", keys=MistralKeys),
    "qwen2": Family(architecture="Qwen2ForCausalLM", keys=Qwen2Keys, fixed={"qkv_bias": True}),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        keys=Qwen3Keys,
        fixed={"qk_norm": True},
        biases=_ATTENTION_BIASES,
    ),
    "opt": Family(
        architecture="OPTForCausalLM",
        keys=OptKeys,
        names=OPT_NAMES,
        fixed={"norm": "layer", "norm_epsilon": 1e-5, "gated": False, "learned_position_offset": 2},
        only={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
        biases={"qkv_bias": "enable_bias", "output_bias": "enable_bias", "mlp_bias": "enable_bias"},
    ),
}

# name in config.json -> in ModelSpec, where they differ
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def read_model_spec(directory: Path | str) -> ModelSpec:
    """Specification of the decoder that `directory`/config.json describes.

    Raises ValueError, one sentence with file, key, value and remedy, for a missing or broken file, values of another
    type or size than expected, unknown architectures, custom code (`auto_map`), quantised checkpoints, and kinds of
    rope, activations or shapes that are not supported.
    """
    path = Path(directory) / "config.json"
    raw = read_object(path)
    try:
        return _spec(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _spec(raw: Json) -> ModelSpec:
    name, family = _family(raw)
    config = decode(family.keys, raw)
    for key, value in family.only.items():
        if raw.get(key, value) is not value:
            raise ValueError(f"{key} is {shown(raw[key])}, but {family.architecture} runs only with {shown(value)}.")
    config.check()
    heads, groups, head_dim = _heads(config)
    rope, max_position = None, config.max_position_embeddings
    if "learned_position_offset" not in family.fixed:
        rope, max_position = read_rope(config, head_dim)
    values: Json = {
        "family": name,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_query_heads": heads,
        "num_head_groups": groups,
        "head_dim": head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position": max_position,
        "dtype": (config.dtype or config.torch_dtype or "float32").removeprefix("torch."),
        "norm_epsilon": config.rms_norm_eps,
        "activation": _ACTIVATIONS.get(config.hidden_act, config.hidden_act),
        "rope": rope,
        "tied_embeddings": config.tie_word_embeddings,
        "windows": config.windows(),
    }
    biases = {field: getattr(config, key) for field, key in family.biases.items()}
    return ModelSpec(**(values | biases | family.fixed))


def _family(raw: Json) -> tuple[str, Family]:
    """Name and entry of the config's architecture. ValueError for configs that require code which hetis lacks."""
    known = ", ".join(row.architecture for row in FAMILIES.values())
    if raw.get("auto_map"):
        raise ValueError(
            f"auto_map is {shown(raw['auto_map'])}: it asks for code from the checkpoint, which hetis never runs; use "
            f"a checkpoint of {known}."
        )
    if raw.get("quantization_config"):
        quantised = raw["quantization_config"]
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise ValueError(f"quantization_config ({shown(method)}) is not supported; use the unquantised checkpoint.")
    if raw.get("dual_chunk_attention_config"):
        raise ValueError(
            "dual_chunk_attention_config asks for attention that is not supported; remove it, and set "
            "max_position_embeddings to the original_max_position_embeddings in it, to run with plain attention."
        )
    identity = decode(IdentityKeys, raw)
    name, architectures = identity.model_type or "", identity.architectures or []
    family = FAMILIES.get(name)
    if family is None or (architectures and family.architecture not in architectures):
        raise ValueError(
            f"model_type is {shown(identity.model_type)} and architectures {shown(identity.architectures)}: not "
            f"supported; use one of {known}."
        )
    return name, family


def _heads(config: DecoderKeys) -> tuple[int, int, int]:
    """(query heads, head groups, head_dim). ValueError for numbers that do not fit together."""
    heads = config.num_attention_heads
    groups = config.num_key_value_heads or heads
    if config.head_dim is None and config.hidden_size % heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {heads}; set head_dim, or correct "
            f"them."
        )
    head_dim = config.head_dim or config.hidden_size // heads
    if heads % groups:
        raise ValueError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}; query heads must share key "
            f"heads evenly."
        )
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(
            f"head_dim is {head_dim} (hidden_size {config.hidden_size}, num_attention_heads {heads}); only multiples "
            f"of 16 up to 256 are supported."
        )
    return heads, groups, head_dim
