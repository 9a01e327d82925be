"""A checkpoint with random weights in Qwen3-0.6B's shape: speed does not depend on their values."""

import json
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def make_checkpoint(directory: Path) -> Path:
    """Writes config and weights, and a tokenizer with one made-up word for each id, into `directory`."""
    import torch
    from safetensors.torch import save_file

    from hetis.models.families import FAMILIES, read_model_spec
    from hetis.models.tensor_names import expected_tensors

    (directory / "config.json").write_text(json.dumps(CONFIG))
    spec = read_model_spec(directory)
    shapes = expected_tensors(spec, FAMILIES[spec.family].names)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if len(shape) > 1
        else torch.ones(shape, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    add_tokenizer(directory)
    return directory


def add_tokenizer(model: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(CONFIG["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "model_max_length": 40960}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
