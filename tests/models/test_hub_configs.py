"""Configs of well-known checkpoints on the hub: the correct spec, or an error that says what is not supported.

Only keys that matter to a decoder, and keys that could be mistaken for one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from hetis.core.model_spec import ModelSpec
from hetis.models.families import read_model_spec

Config = dict[str, Any]


def decoder(model_type: str, hidden: int, mlp: int, layers: int, heads: int, vocab: int, **more: Any) -> Config:
    architectures = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}
    return {
        "architectures": [f"{architectures[model_type]}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "initializer_range": 0.02,
        **more,
    }


def opt(hidden: int, layers: int, heads: int, **more: Any) -> Config:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "ffn_dim": 4 * hidden,
        "hidden_size": hidden,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "torch_dtype": "float16",
        "vocab_size": 50272,
        "word_embed_proj_dim": hidden,
        "layerdrop": 0.0,
        "prefix": "</s>",
        **more,
    }


def qwen25(hidden: int, mlp: int, layers: int, heads: int, groups: int, vocab: int = 152064, **more: Any) -> Config:
    sliding = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": layers, "use_mrope": False}
    values = {"num_key_value_heads": groups, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0} | sliding
    return decoder("qwen2", hidden, mlp, layers, heads, vocab, **values | {"max_position_embeddings": 32768} | more)


def qwen3(hidden: int, mlp: int, layers: int, heads: int, groups: int = 8, **more: Any) -> Config:
    sliding = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": layers}
    values = {"num_key_value_heads": groups, "head_dim": 128, "attention_bias": False, "rope_scaling": None} | sliding
    values |= {"max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "rope_theta": 1000000}
    return decoder("qwen3", hidden, mlp, layers, heads, 151936, **values | more)


LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": None, "pretraining_tp": 1}
LLAMA_2_7B = decoder("llama", 4096, 11008, 32, 32, 32000, **LLAMA_2, tie_word_embeddings=False)
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
QWEN25_7B = qwen25(3584, 18944, 28, 28, 4, tie_word_embeddings=False)
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05}

# name -> (config, expected: groups, head_dim, positions, tied, kind of rope, theta, window)
CHECKPOINTS: dict[str, tuple[Config, tuple[int, int, int, bool, str, float, int]]] = {
    "Qwen2.5-0.5B": (
        qwen25(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
        (2, 64, 32768, True, "none", 1e6, 0),
    ),
    "Qwen2.5-7B": (QWEN25_7B, (4, 128, 32768, False, "none", 1e6, 0)),
    "Qwen2.5-72B": (qwen25(8192, 29568, 80, 64, 8), (8, 128, 32768, False, "none", 1e6, 0)),
    "Qwen2.5-7B with yarn as its card says": (
        QWEN25_7B | {"rope_scaling": YARN},
        (4, 128, 131072, False, "yarn", 1e6, 0),
    ),
    "QwQ-32B with yarn": (
        qwen25(5120, 27648, 64, 40, 8, max_position_embeddings=131072, rope_scaling=YARN),
        (8, 128, 131072, False, "yarn", 1e6, 0),
    ),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, tie_word_embeddings=True), (8, 128, 40960, True, "none", 1e6, 0)),
    "Qwen3-32B": (qwen3(5120, 25600, 64, 64), (8, 128, 40960, False, "none", 1e6, 0)),
    "Qwen3-8B with yarn as its card says": (
        qwen3(4096, 12288, 36, 32, rope_scaling=YARN | {"rope_type": "yarn"}),
        (8, 128, 131072, False, "yarn", 1e6, 0),
    ),
    "DeepSeek-R1-0528-Qwen3-8B": (
        qwen3(4096, 12288, 36, 32, max_position_embeddings=131072, rope_scaling=YARN | {"attn_factor": 0.87824885}),
        (8, 128, 131072, False, "yarn", 1e6, 0),
    ),
    "Qwen3-4B-Instruct-2507": (
        qwen3(2560, 9728, 36, 32, max_position_embeddings=262144, rope_theta=5000000, tie_word_embeddings=True),
        (8, 128, 262144, True, "none", 5e6, 0),
    ),
    "Qwen3-0.6B saved by transformers 5": (
        {
            key: value
            for key, value in qwen3(1024, 3072, 28, 16, tie_word_embeddings=True).items()
            if key not in ("torch_dtype", "rope_theta", "rope_scaling")
        }
        | {
            "dtype": "bfloat16",
            "layer_types": ["full_attention"] * 28,
            "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
            "pad_token_id": None,
        },
        (8, 128, 40960, True, "none", 1e6, 0),
    ),
    "Llama-2-7b": (LLAMA_2_7B, (32, 128, 4096, False, "none", 1e4, 0)),
    "Llama-2-70b": (
        decoder("llama", 8192, 28672, 80, 64, 32000, **LLAMA_2, num_key_value_heads=8),
        (8, 128, 4096, False, "none", 1e4, 0),
    ),
    "Llama-3.1-8B": (
        decoder(
            "llama",
            4096,
            14336,
            32,
            32,
            128256,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rope_theta=500000.0,
            rope_scaling=LLAMA3_ROPE,
            attention_bias=False,
            mlp_bias=False,
        ),
        (8, 128, 131072, False, "llama3", 5e5, 0),
    ),
    "Llama-3.2-1B": (
        decoder(
            "llama",
            2048,
            8192,
            16,
            32,
            128256,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=131072,
            rope_theta=500000.0,
            rope_scaling=LLAMA3_ROPE | {"factor": 32.0},
            tie_word_embeddings=True,
        ),
        (8, 64, 131072, True, "llama3", 5e5, 0),
    ),
    "TinyLlama-1.1B": (
        decoder(
            "llama",
            2048,
            5632,
            22,
            32,
            32000,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            rms_norm_eps=1e-05,
            rope_scaling=None,
        ),
        (4, 64, 2048, False, "none", 1e4, 0),
    ),
    "vicuna-7b-v1.5-16k": (
        LLAMA_2_7B | {"max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        (32, 128, 16384, False, "linear", 1e4, 0),
    ),
    "CodeLlama-7b": (
        LLAMA_2_7B | {"vocab_size": 32016, "max_position_embeddings": 16384, "rope_theta": 1000000},
        (32, 128, 16384, False, "none", 1e6, 0),
    ),
    "deepseek-coder-6.7b": (
        LLAMA_2_7B
        | {"max_position_embeddings": 16384, "rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        (32, 128, 65536, False, "linear", 1e5, 0),
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        qwen25(3584, 18944, 28, 28, 4, max_position_embeddings=131072, rope_theta=10000, sliding_window=4096),
        (4, 128, 131072, False, "none", 1e4, 0),
    ),
    "SmolLM2-135M": (
        decoder(
            "llama",
            576,
            1536,
            30,
            9,
            49152,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_theta=100000,
            rope_interleaved=False,
            rope_scaling=None,
            tie_word_embeddings=True,
            is_llama_config=True,
            rms_norm_eps=1e-05,
        ),
        (3, 64, 8192, True, "none", 1e5, 0),
    ),
    "Yi-1.5-9B": (
        decoder(
            "llama", 4096, 11008, 48, 32, 64000, num_key_value_heads=4, max_position_embeddings=4096, rope_theta=5e6
        ),
        (4, 128, 4096, False, "none", 5e6, 0),
    ),
    "Mistral-7B-v0.1": (
        decoder("mistral", 4096, 14336, 32, 32, 32000, **MISTRAL, sliding_window=4096, rope_theta=10000.0),
        (8, 128, 32768, False, "none", 1e4, 4096),
    ),
    "Mistral-7B-v0.3": (
        decoder("mistral", 4096, 14336, 32, 32, 32768, **MISTRAL, sliding_window=None, rope_theta=1000000.0),
        (8, 128, 32768, False, "none", 1e6, 0),
    ),
    "Mistral-Nemo": (
        decoder(
            "mistral",
            5120,
            14336,
            40,
            32,
            131072,
            **MISTRAL | {"max_position_embeddings": 131072},
            head_dim=128,
            sliding_window=None,
            rope_theta=1000000.0,
        ),
        (8, 128, 131072, False, "none", 1e6, 0),
    ),
}


def write(directory: Path, config: Config) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def outcome(spec: ModelSpec) -> tuple[int, int, int, bool, str, float, int]:
    assert spec.rope is not None
    assert len(spec.windows) == spec.num_layers
    (window,) = set(spec.windows)
    rope = spec.rope
    return (
        spec.num_head_groups,
        spec.head_dim,
        spec.max_position,
        spec.tied_embeddings,
        rope.scaling,
        rope.theta,
        window,
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_specs_of_known_checkpoints(tmp_path: Path, name: str) -> None:
    config, expected = CHECKPOINTS[name]
    spec = read_model_spec(write(tmp_path, config))
    assert outcome(spec) == expected
    assert spec.dtype == "bfloat16"
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (spec.num_query_heads, spec.num_layers) == (theirs.num_attention_heads, theirs.num_hidden_layers)
    assert (spec.vocab_size, spec.intermediate_size) == (theirs.vocab_size, theirs.intermediate_size)
    assert (spec.num_head_groups, spec.norm_epsilon) == (theirs.num_key_value_heads, theirs.rms_norm_eps)
    assert (spec.tied_embeddings, spec.dtype) == (theirs.tie_word_embeddings, str(theirs.dtype).removeprefix("torch."))


@pytest.mark.parametrize(("hidden", "layers", "heads", "head_dim"), [(768, 12, 12, 64), (2560, 32, 32, 80)])
def test_opt_125m_and_2_7b(tmp_path: Path, hidden: int, layers: int, heads: int, head_dim: int) -> None:
    spec = read_model_spec(write(tmp_path, opt(hidden, layers, heads)))
    assert (spec.head_dim, spec.num_head_groups, spec.max_position) == (head_dim, heads, 2048)
    assert (spec.intermediate_size, spec.tied_embeddings, spec.rope, spec.dtype) == (4 * hidden, True, None, "float16")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (opt(1024, 24, 16, word_embed_proj_dim=512), ["word_embed_proj_dim", "opt-350m"]),
        (opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False), ["do_layer_norm_before is false"]),
        (decoder("phi3", 3072, 8192, 32, 32, 32064), ["phi3", "LlamaForCausalLM"]),
        (LLAMA_2_7B | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ["longrope", "not supported"]),
        (
            LLAMA_2_7B | {"rope_scaling": {"factor": 32.0, "type": "yarn"}, "auto_map": {"AutoConfig": "x.Y"}},
            ["auto_map"],
        ),
        (QWEN25_7B | {"quantization_config": {"bits": 4, "quant_method": "gptq"}}, ["gptq", "unquantised"]),
        (
            QWEN25_7B | {"dual_chunk_attention_config": {"original_max_position_embeddings": 262144}},
            ["dual_chunk_attention_config", "max_position_embeddings"],
        ),
        (QWEN25_7B | {"architectures": ["Qwen2ForRewardModel"]}, ["Qwen2ForRewardModel", "Qwen2ForCausalLM"]),
        (decoder("llama", 3200, 8640, 26, 32, 32000), ["head_dim is 100", "hidden_size 3200"]),  # open_llama_3b
    ],
)
def test_unsupported_checkpoints_are_refused(tmp_path: Path, config: Config, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        read_model_spec(write(tmp_path, config))
    message = str(refused.value)
    assert all(word in message for word in [str(tmp_path / "config.json"), *words]), message
    assert message.endswith(".")
