"""The tokenizer of a model: what its tokenizer.json says, with transformers' chat templates around it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hetis.models.hub import resolve_model

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_loading = threading.Lock()  # a thread that imports transformers while another one does finds half of it


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
    with _loading, _one_sentence(f"the tokenizer in {directory} cannot be loaded", "download it again"):
        return _load(directory, is_complete="tokenizer.json" in found)


@contextmanager
def _one_sentence(what: str, remedy: str) -> Iterator[None]:
    """ValueError for whatever the libraries raise: a panic of tokenizers' Rust code is not even an Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(f"{what} ({reason}); {remedy}.") from error


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


def encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer puts around text; a begin of sequence that the
    text has already (a chat template wrote it) is not doubled. By the tokenizer below transformers', for threads.
    ValueError for text that it cannot encode: some have no token for unknown characters."""
    backend, begin = tokenizer.backend_tokenizer, tokenizer.bos_token_id
    with _one_sentence("the tokenizer cannot encode a prompt", "give token ids, or another tokenizer"):
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
    if add_special_tokens and begin is not None and ids[:2] == [begin, begin]:
        plain = backend.encode(text, add_special_tokens=False).ids
        if plain[:1] == [begin] and ids[1 : 1 + len(plain)] == plain:
            return ids[1:]
    return ids
