"""Tiny random Hugging Face checkpoints for tests, and what transformers computes with them.

Matrices have six times the default deviation, so that an early token changes the last logits by about 1: with default
weights attention hardly matters and its bugs stay hidden. Norm weights and biases are random too.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

from tests.byte_level import train_byte_level

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so that short prompts cover all three ranges of wavelengths
}
_YARN = {  # positions of short prompts lie beyond the original length; 2048 in all
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 64.0,
    "original_max_position_embeddings": 32,
}

# name -> (configuration class, what differs from `_SMALL`)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 9}),
    "qwen2": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 64, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", {"ffn_dim": 208, "word_embed_proj_dim": 128, "num_attention_heads": 4}),
    "mqa": ("LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "five_groups": ("Qwen3Config", {"num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 32}),
    "three_groups": (
        "MistralConfig",
        {
            "hidden_size": 192,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "sliding_window": None,
            "rope_parameters": _YARN,
        },
    ),
    "head_dim_80": ("LlamaConfig", {"hidden_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "head_dim_128": ("Qwen3Config", {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2}),
}

_SMALL: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 128,
    "intermediate_size": 203,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "init_std": 0.12,  # the same in OPT's config
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

_NOT_OPT = ("intermediate_size", "num_key_value_heads", "head_dim")
_TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of light, it was the season of "
    "darkness. "
)


def make_checkpoint(
    directory: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Writes a checkpoint (config, safetensors, tokenizer) of an entry of `FAMILIES`; `overrides` change its config."""
    kind, differences = FAMILIES[family]
    values = _SMALL | differences | overrides
    if kind == "OPTConfig":
        values = {key: value for key, value in values.items() if key not in _NOT_OPT}
    elif "head_dim" not in differences | overrides:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    config = getattr(transformers, kind)(**values)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
    model.to(dtype).save_pretrained(directory)
    make_tokenizer(values["vocab_size"]).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}'
    )
    return directory


@cache
def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` tokens; ids 0 and 1 are <s> and </s>."""
    tokenizer = train_byte_level([_TEXT], vocab_size, ["<s>", "</s>"])
    assert tokenizer.get_vocab_size() <= vocab_size, "a byte-level tokenizer has at least 258 tokens"
    return tokenizer


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Model of transformers, with eager attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", local_files_only=True
    ).eval()


@torch.inference_mode()
def reference_logits(model: Any, token_ids: list[int]) -> Tensor:
    """Logits after every token, float32 [T, V]."""
    logits: Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0].float()
    return logits


@torch.inference_mode()
def greedy_reference(model: Any, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """`num_tokens` greedy tokens after the prompt; end-of-sequence does not stop it."""
    out: list[int] = []
    new, past = torch.tensor([prompt_ids]), None
    for _ in range(num_tokens):
        step = model(new, past_key_values=past, use_cache=True)
        new, past = step.logits[:, -1:].argmax(dim=-1), step.past_key_values
        out.append(int(new))
    return out
