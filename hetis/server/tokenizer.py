"""The tokenizer of a model, as transformers makes it."""

import json
from pathlib import Path
from typing import Any

from hetis.models.hub import resolve_model

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Classes that add nothing to tokenizer.json, or nothing that it does not say. `AutoTokenizer` would find them too, but
# it imports torch, which the front end needs for nothing: a second, on every start.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast")


def load_tokenizer(source: str | Path | None, revision: str | None) -> Any:
    """The model's fast tokenizer, or None when the directory has none (then prompts are token ids).

    ValueError if it cannot be loaded.
    """
    import transformers

    directory = resolve_model(None if source is None else str(source), revision, weights=False)
    if not any((directory / name).exists() for name in _FILES):
        return None
    try:
        name = _class_name(directory)
        kind = getattr(transformers, name if name in _PLAIN else "AutoTokenizer")
        return kind.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # of several libraries
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(f"the tokenizer in {directory} cannot be loaded ({reason}); download it again.") from error


def _class_name(directory: Path) -> str | None:
    """The class that tokenizer_config.json names, if tokenizer.json has all it needs."""
    config = directory / "tokenizer_config.json"
    if not config.exists() or not (directory / "tokenizer.json").exists():
        return None
    name: str | None = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    return name
