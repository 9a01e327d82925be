"""Tokenizers: tokenizer.json decides the ids; transformers adds special tokens and the chat template."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hetis.models.hub import resolve_model

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_loading = threading.Lock()  # two threads must not import transformers at once: one would see a partial module


def load_tokenizer(source: str | Path | None, revision: str | None, what: str = "model") -> Any:
    """The fast tokenizer in a directory or hub repository; None if there is none (then prompts must be token ids).

    With a tokenizer.json its token ids are those of `tokenizers.Tokenizer.from_file`, whatever class
    tokenizer_config.json names; that file adds special tokens and the chat template. `what`: "model" or "tokenizer",
    the name of `source` in errors. Raises ValueError if the tokenizer cannot be loaded, or a "tokenizer" has none.
    """
    directory = resolve_model(None if source is None else str(source), revision, weights=False, what=what)
    found = [name for name in _FILES if (directory / name).exists()]
    if not found:
        if what == "tokenizer":
            raise ValueError(f"tokenizer {str(source)!r} has none of {', '.join(_FILES)}; give a directory with one.")
        return None
    if found == ["tokenizer.model"] and find_spec("sentencepiece") is None:
        raise ValueError(
            f"the tokenizer in {directory} is a tokenizer.model without tokenizer.json; pip install sentencepiece "
            "protobuf, or give the tokenizer.json of the same model by --tokenizer (tokenizer=)."
        )
    with _loading, _user_error(f"the tokenizer in {directory} cannot be loaded", "download it again"):
        return _load(directory, is_complete="tokenizer.json" in found)


@contextmanager
def _user_error(what: str, remedy: str) -> Iterator[None]:
    """Turns errors of the libraries into ValueError, also panics of tokenizers' Rust code, which are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(f"{what} ({reason}); {remedy}.") from error


def _load(directory: Path, is_complete: bool) -> Any:
    """Loads a tokenizer. `is_complete`: there is a tokenizer.json.

    Then the plain class is used: others build their own normaliser, pre-tokeniser and decoder, and `AutoTokenizer`
    imports torch, which takes a second of every start.
    """
    import transformers

    kind = transformers.PreTrainedTokenizerFast if is_complete else transformers.AutoTokenizer
    tokenizer = kind.from_pretrained(str(directory), trust_remote_code=False)
    # prompts are never truncated or padded; set once, so that threads do not change the shared tokenizer
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a prompt. Safe to call from threads, as it uses the tokenizer below that of transformers.

    `add_special_tokens`: with those that the tokenizer puts around text; a begin-of-sequence token that the text has
    already, such as from a chat template, is not doubled. Raises ValueError for text that cannot be encoded: some
    tokenizers have no token for unknown characters.
    """
    backend, begin = tokenizer.backend_tokenizer, tokenizer.bos_token_id
    with _user_error("the tokenizer cannot encode a prompt", "give token ids, or another tokenizer"):
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
    if add_special_tokens and begin is not None and ids[:2] == [begin, begin]:
        plain = backend.encode(text, add_special_tokens=False).ids
        if plain[:1] == [begin] and ids[1 : 1 + len(plain)] == plain:
            return ids[1:]
    return ids
