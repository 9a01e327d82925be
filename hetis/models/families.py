"""From a Hugging Face config.json to a `ModelSpec`: one row per architecture, plain JSON, no code from the checkpoint.

A new architecture of the family is a new row in `FAMILIES`. What a row does not know is refused, never guessed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from hetis.core.model_spec import Dtype, ModelSpec, RopeSpec

Config = dict[str, Any]


class TensorNames(NamedTuple):
    """Names in the checkpoint: whole ones of tensors outside layers, and module names below `layer`."""

    embedding: str
    positions: str
    final_norm: str
    head: str
    layer: str  # with {layer}
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


def _no_windows(config: Config, num_layers: int) -> tuple[int, ...]:
    return (0,) * num_layers


def _one_window(config: Config, num_layers: int) -> tuple[int, ...]:
    """Mistral: every layer has the window, or none has when it is null."""
    return (int(config["sliding_window"] or 0),) * num_layers


def _windows_by_layer(config: Config, num_layers: int) -> tuple[int, ...]:
    """Qwen: `layer_types` where given; else the layers from `max_window_layers` on slide, if `use_sliding_window`."""
    window = config["sliding_window"] if config["use_sliding_window"] else None
    first = config["max_window_layers"]
    kinds = config.get("layer_types") or [
        "sliding_attention" if window and layer >= first else "full_attention" for layer in range(num_layers)
    ]
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types {sorted(set(kinds))} for {len(kinds)} of {num_layers} layers; only full_attention and "
            f"sliding_attention, one per layer, are supported."
        )
    if "sliding_attention" in kinds and not window:
        raise ValueError("layer_types names sliding_attention, but sliding_window is not in use; set sliding_window.")
    return tuple(int(window or 0) if kind == "sliding_attention" else 0 for kind in kinds)


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One architecture: what its config.json leaves out, what its code decides, and how it names its tensors."""

    architecture: str
    defaults: Config  # values that transformers assumes for keys that config.json leaves out
    names: TensorNames = LLAMA_NAMES
    keys: dict[str, str] = {}  # our key -> its name in this config.json, where that is not Llama's
    fixed: dict[str, Any] = {}  # ModelSpec fields that the architecture decides
    only: Config = {}  # keys of which only this value is supported
    biases: dict[str, str] = {}  # ModelSpec bias field -> the key that decides it
    windows: Callable[[Config, int], tuple[int, ...]] = _no_windows


_DEFAULTS: Config = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "head_dim": None,
}
_QWEN_DEFAULTS: Config = _DEFAULTS | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults=_DEFAULTS | {"attention_bias": False, "mlp_bias": False},
        biases={"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults=_DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        windows=_one_window,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN_DEFAULTS,
        fixed={"qkv_bias": True},
        windows=_windows_by_layer,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
        fixed={"qk_norm": True},
        biases={"qkv_bias": "attention_bias", "output_bias": "attention_bias"},
        windows=_windows_by_layer,
    ),
    "opt": Family(
        architecture="OPTForCausalLM",
        defaults=_DEFAULTS | {"activation_function": "relu", "tie_word_embeddings": True, "enable_bias": True},
        names=OPT_NAMES,
        keys={"hidden_act": "activation_function", "intermediate_size": "ffn_dim"},
        fixed={"norm": "layer", "norm_epsilon": 1e-5, "gated": False, "learned_position_offset": 2},
        only={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
        biases={"qkv_bias": "enable_bias", "output_bias": "enable_bias", "mlp_bias": "enable_bias"},
    ),
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
_ROPE_KINDS = ("default", "linear", "llama3")


def read_model_spec(directory: Path | str) -> ModelSpec:
    """The decoder described by `directory`/config.json.

    Raises ValueError, one sentence with file, value and remedy, for a missing or broken file, unknown architectures,
    custom code (`auto_map`), quantised checkpoints, and rope kinds, activations or shapes that hetis does not compute.
    """
    path = Path(directory) / "config.json"
    config = _read_json(path)
    try:
        return _spec(config)
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]}; it is not a complete config of a decoder.") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_eos_token_ids(directory: Path | str) -> list[int]:
    """The ids that end a sequence: from generation_config.json, else config.json; empty when neither names one."""
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        if path.exists():
            ids = _read_json(path).get("eos_token_id")
            if ids is not None:
                return [ids] if isinstance(ids, int) else [int(i) for i in ids]
    return []


def _read_json(path: Path) -> Config:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a directory with a Hugging Face checkpoint.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object; download it again.")
    return config


def _spec(raw: Config) -> ModelSpec:
    family = _family(raw)
    config = family.defaults | raw
    key = {ours: family.keys.get(ours, ours) for ours in ("hidden_act", "intermediate_size")}
    for name in (*_COUNTS, key["intermediate_size"]):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{name} is {config[name]!r}; it must be a positive whole number.")
    heads, groups, head_dim = _heads(config)
    rope = None if "learned_position_offset" in family.fixed else _rope(config, head_dim)
    values: dict[str, Any] = {
        "family": raw["model_type"],
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_query_heads": heads,
        "num_head_groups": groups,
        "head_dim": head_dim,
        "intermediate_size": config[key["intermediate_size"]],
        "vocab_size": config["vocab_size"],
        "max_position": config["max_position_embeddings"],
        "dtype": _dtype(config),
        "norm_epsilon": config["rms_norm_eps"],
        "activation": _activation(config[key["hidden_act"]]),
        "rope": rope,
        "tied_embeddings": config["tie_word_embeddings"],
        "windows": family.windows(config, config["num_hidden_layers"]),
    }
    biases = {field: bool(config[decider]) for field, decider in family.biases.items()}
    return ModelSpec(**(values | biases | family.fixed))


def _family(raw: Config) -> Family:
    """The row for this config; everything that would need other code is refused here."""
    known = ", ".join(row.architecture for row in FAMILIES.values())
    if raw.get("auto_map"):
        raise ValueError(
            f"auto_map asks for code from the checkpoint ({', '.join(map(str, raw['auto_map']))}), which hetis never "
            f"runs; use a checkpoint of {known}."
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"quantization_config ({method}) is not supported; use the unquantised checkpoint.")
    kind, architectures = raw.get("model_type"), raw.get("architectures") or []
    family = FAMILIES.get(str(kind))
    if family is None or (architectures and family.architecture not in architectures):
        raise ValueError(
            f"architecture {', '.join(architectures) or 'unnamed'} (model_type {kind}) is not supported; use one of "
            f"{known}."
        )
    for name, value in family.only.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{name} is {raw[name]}, but {family.architecture} runs only with {value}.")
    width = raw.get("word_embed_proj_dim", raw.get("hidden_size"))
    if width != raw.get("hidden_size"):
        raise ValueError(
            f"word_embed_proj_dim is {width} and hidden_size {raw['hidden_size']}: layers that project in and out of a "
            f"narrower embedding (as in opt-350m) are not supported; use another size of the family."
        )
    return family


def _heads(config: Config) -> tuple[int, int, int]:
    """(query heads, head groups, head_dim), checked."""
    heads = config["num_attention_heads"]
    groups = config["num_key_value_heads"] or heads
    head_dim = config["head_dim"]
    if not head_dim:
        if config["hidden_size"] % heads:
            raise ValueError(f"hidden_size {config['hidden_size']} is no multiple of num_attention_heads {heads}.")
        head_dim = config["hidden_size"] // heads
    if heads % groups:
        raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}.")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(f"head_dim is {head_dim}; only multiples of 16 up to 256 are supported.")
    return heads, groups, head_dim


def _rope(config: Config, head_dim: int) -> RopeSpec:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_parameters differ by layer ({', '.join(rope)}), which is not supported.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_KINDS:
        raise ValueError(
            f"rope scaling {kind!r} is not supported (only {', '.join(_ROPE_KINDS)}); remove it from the config to run "
            f"with the positions the model was trained on."
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor is {partial}; only rope over the whole head is supported.")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    scaling: Config = {}
    if kind == "linear":
        scaling = {"scaling": "linear", "factor": float(rope["factor"])}
    elif kind == "llama3":
        original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        factors = {name: float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling = {"scaling": "llama3", "original_max_position": int(original), **factors}
    return RopeSpec(theta=theta, rotary_dim=head_dim, **scaling)


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; only {', '.join(_ACTIVATIONS)} are.")
    return _ACTIVATIONS[name]


def _dtype(config: Config) -> Dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {name!r} of the checkpoint is not supported; only float32, bfloat16 and float16 are.")
    return cast(Dtype, name)
