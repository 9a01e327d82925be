"""The tokenizer of a model: what its tokenizer.json says, with transformers' chat templates around it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hetis.models.hub import resolve_model

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(source: str | Path | None, revision: str | None, what: str = "model") -> Any:
    """The fast tokenizer in a directory or hub repository, or None when it has none (then prompts are token ids).

    With a tokenizer.json its token ids are those of `tokenizers.Tokenizer.from_file`, whatever class
    tokenizer_config.json names; that file adds special tokens and the chat template. `what`: what `source` is called in
    errors; a "tokenizer" must have one. ValueError if it cannot be loaded.
    """
    directory = resolve_model(None if source is None else str(source), revision, weights=False, what=what)
    found = [name for name in _FILES if (directory / name).exists()]
    if not found:
        if what == "tokenizer":
            raise ValueError(f"tokenizer {str(source)!r} has none of {', '.join(_FILES)}; give the directory of one.")
        return None
    if found == ["tokenizer.model"] and find_spec("sentencepiece") is None:
        raise ValueError(
            f"the tokenizer in {directory} is a tokenizer.model without tokenizer.json: pip install sentencepiece "
            "protobuf, or give the tokenizer.json of the same model by --tokenizer (tokenizer=)."
        )
    try:
        return _load(directory, is_complete="tokenizer.json" in found)
    except Exception as error:  # of several libraries
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(f"the tokenizer in {directory} cannot be loaded ({reason}); download it again.") from error


def _load(directory: Path, is_complete: bool) -> Any:
    """`is_complete`: there is a tokenizer.json. The plain class adds nothing to it; others build their own normaliser,
    pre-tokeniser and decoder. (`AutoTokenizer` would also import torch: a second, on every start.)"""
    import transformers

    kind = transformers.PreTrainedTokenizerFast if is_complete else transformers.AutoTokenizer
    tokenizer = kind.from_pretrained(str(directory), trust_remote_code=False)
    # prompts are never cut or filled up, and threads that encode at once find nothing to change
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer
