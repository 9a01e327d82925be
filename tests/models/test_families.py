"""Old and new forms of config.json give the spec that transformers uses; unsupported settings are refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hetis.core.model_spec import RopeSpec, resolve_dtype
from hetis.models.families import read_model_spec

# As on the hub, written by transformers 4; only keys that matter to a decoder.
LLAMA_31: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA_2 = {
    key: value for key, value in LLAMA_31.items() if key not in ("rope_scaling", "rope_theta", "num_key_value_heads")
}
QWEN_25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_window_layers": 21,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151643,
}
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "torch_dtype": "float16",
}
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "sliding_window": 4096,
}


def write(directory: Path, config: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_llama_31_as_on_the_hub(tmp_path: Path) -> None:
    spec = read_model_spec(write(tmp_path, LLAMA_31))
    assert (spec.head_dim, spec.num_head_groups, spec.queries_per_group) == (128, 8, 4)
    assert (spec.dtype, spec.norm_epsilon, spec.max_position) == ("bfloat16", 1e-5, 131072)
    assert spec.rope == RopeSpec(
        theta=500000.0,
        rotary_dim=128,
        scaling="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    assert spec.windows == (0,) * 32
    assert (spec.qkv_bias, spec.mlp_bias, spec.tied_embeddings, spec.qk_norm) == (False,) * 4


def test_defaults_of_absent_keys_are_those_of_transformers(tmp_path: Path) -> None:
    spec = read_model_spec(write(tmp_path, LLAMA_2))
    assert (spec.num_head_groups, spec.queries_per_group) == (32, 1)
    assert spec.rope == RopeSpec(theta=10000.0, rotary_dim=128)
    mistral = read_model_spec(write(tmp_path, MISTRAL))
    assert (mistral.num_head_groups, mistral.max_position, mistral.norm_epsilon) == (8, 131072, 1e-6)
    assert mistral.windows == (4096,) * 32
    assert mistral.dtype == "float32"
    assert read_model_spec(write(tmp_path, MISTRAL | {"sliding_window": None})).windows == (0,) * 32
    assert read_model_spec(write(tmp_path, MISTRAL | {"head_dim": 64})).head_dim == 64


def test_qwen_windows(tmp_path: Path) -> None:
    assert read_model_spec(write(tmp_path, QWEN_25)).windows == (0,) * 24
    sliding = QWEN_25 | {"use_sliding_window": True}
    assert read_model_spec(write(tmp_path, sliding)).windows == (0,) * 21 + (32768,) * 3
    kinds = ["sliding_attention", "full_attention"] * 12
    assert read_model_spec(write(tmp_path, sliding | {"layer_types": kinds})).windows == (32768, 0) * 12
    spec = read_model_spec(write(tmp_path, QWEN_25))
    assert spec.qkv_bias
    assert spec.tied_embeddings
    assert not spec.output_bias


def test_opt(tmp_path: Path) -> None:
    spec = read_model_spec(write(tmp_path, OPT))
    assert (spec.norm, spec.norm_epsilon, spec.gated, spec.activation) == ("layer", 1e-5, False, "relu")
    assert (spec.rope, spec.learned_position_offset, spec.tied_embeddings) == (None, 2, True)
    assert spec.qkv_bias
    assert spec.output_bias
    assert spec.mlp_bias


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (
            LLAMA_31,
            {"architectures": ["FancyForCausalLM"], "model_type": "fancy"},
            ["FancyForCausalLM", "LlamaForCausalLM"],
        ),
        (LLAMA_31, {"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        (LLAMA_31, {"model_type": None, "architectures": None}, ["model_type is null", "architectures null"]),
        (LLAMA_31, {"model_type": "mistral"}, ['"mistral"', "LlamaForCausalLM"]),
        (LLAMA_31, {"architectures": "LlamaForCausalLM"}, ["architectures", "list of texts"]),
        (LLAMA_31, {"auto_map": {"AutoModelForCausalLM": "modeling.Fancy"}}, ["auto_map", "never"]),
        (LLAMA_31, {"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq", "unquantised"]),
        (LLAMA_31, {"quantization_config": "awq"}, ["quantization_config", "awq", "unquantised"]),
        (QWEN_25, {"dual_chunk_attention_config": {"chunk_size": 262144}}, ["dual_chunk_attention_config", "remove"]),
        (LLAMA_31, {"rope_scaling": "linear"}, ['rope_scaling is "linear"', "object"]),
        (LLAMA_31, {"rope_interleaved": True}, ["rope_interleaved is true", "false"]),
        (LLAMA_31, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        (LLAMA_31, {"hidden_act": "xielu"}, ["xielu", "silu"]),
        (LLAMA_31, {"num_key_value_heads": 5}, ["32", "5"]),
        (LLAMA_31, {"head_dim": 24}, ["24", "16"]),
        (LLAMA_31, {"num_attention_heads": 31, "num_key_value_heads": 31}, ["4096", "31"]),
        (LLAMA_31, {"torch_dtype": "float64"}, ["torch_dtype", "float64", "bfloat16"]),
        (LLAMA_31, {"dtype": "int8"}, ["dtype", "int8"]),
        (LLAMA_31, {"vocab_size": 0}, ["vocab_size is 0", "from 1"]),
        (LLAMA_31, {"vocab_size": 128256.0}, ["vocab_size is 128256.0", "whole number"]),
        (LLAMA_31, {"num_hidden_layers": "32"}, ['num_hidden_layers is "32"', "whole number"]),
        (LLAMA_31, {"num_hidden_layers": 10**9}, ["num_hidden_layers is 1000000000", "10000"]),
        (LLAMA_31, {"max_position_embeddings": True}, ["max_position_embeddings is true"]),
        (LLAMA_31, {"hidden_size": [4096]}, ["hidden_size is [4096]"]),
        (LLAMA_31, {"hidden_size": None}, ["hidden_size is null"]),
        (LLAMA_31, {"rms_norm_eps": "1e-05"}, ['rms_norm_eps is "1e-05"', "without quotes"]),
        (LLAMA_31, {"rms_norm_eps": float("nan")}, ["rms_norm_eps is NaN"]),
        (LLAMA_31, {"tie_word_embeddings": "false"}, ['tie_word_embeddings is "false"', "without quotes"]),
        (LLAMA_31, {"attention_bias": 1}, ["attention_bias is 1"]),
        (LLAMA_31, {"rope_theta": "500000"}, ['rope_theta is "500000"']),
        (LLAMA_31, {"head_dim": 0}, ["head_dim is 0"]),
        (MISTRAL, {"sliding_window": -1}, ["sliding_window is -1"]),
        (MISTRAL, {"sliding_window": "x" * 1000}, ["sliding_window", "xxx..."]),
        (QWEN_25, {"layer_types": ["full_attention"] * 3}, ["layer_types", "3", "24"]),
        (QWEN_25, {"layer_types": ["linear_attention"] * 24}, ["linear_attention"]),
        (QWEN_25, {"layer_types": ["sliding_attention"] * 24}, ["layer_types", "use_sliding_window"]),
        (QWEN_25, {"layer_types": 3}, ["layer_types is 3"]),
        (QWEN_25, {"use_sliding_window": "false"}, ["use_sliding_window"]),
        (OPT, {"word_embed_proj_dim": 512}, ["word_embed_proj_dim", "512", "768", "opt-350m"]),
        (OPT, {"do_layer_norm_before": False}, ["do_layer_norm_before is false", "true"]),
        (OPT, {"ffn_dim": 0}, ["ffn_dim is 0"]),
        (OPT, {"activation_function": "tanh"}, ["activation_function", "tanh", "relu"]),
        (OPT, {"_remove_final_layer_norm": True}, ["_remove_final_layer_norm"]),
    ],
)
def test_unsupported_and_malformed_configs_are_refused(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as refused:
        read_model_spec(write(tmp_path, base | change))
    message = str(refused.value)
    assert str(tmp_path / "config.json") in message
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert message.endswith(".")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json: vocab_size is missing; it must be a whole number"):
        read_model_spec(write(tmp_path, {key: value for key, value in OPT.items() if key != "vocab_size"}))


def test_either_key_of_the_dtype(tmp_path: Path) -> None:
    assert read_model_spec(write(tmp_path, OPT | {"torch_dtype": "torch.bfloat16"})).dtype == "bfloat16"
    assert read_model_spec(write(tmp_path, OPT | {"dtype": "float32"})).dtype == "float32"  # the newer key
    assert read_model_spec(write(tmp_path, OPT | {"dtype": None, "torch_dtype": None})).dtype == "float32"


def test_dtype_auto_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    spec = read_model_spec(write(tmp_path, OPT))
    assert resolve_dtype("auto", spec) == "float16"
    assert resolve_dtype("bfloat16", spec) == "bfloat16"
    with pytest.raises(ValueError, match="int8"):
        resolve_dtype("int8", spec)


def test_reading_a_spec_needs_no_torch() -> None:
    """Front ends and launchers read it, and start faster without torch."""
    code = """
import sys
import hetis.models.families, hetis.models.hub, hetis.models.end_tokens, hetis.models.weight_files
import hetis.core.plan, hetis.cost.memory
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
