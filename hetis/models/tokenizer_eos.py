"""The end-of-sequence token that a tokenizer names. Fine-tunes for chat often change it there and not in the config."""

from pathlib import Path
from typing import Any

import msgspec

from hetis.models.json_files import read_object

# where the name of the token may be, the first one first
_NAMED_IN = ("tokenizer_config.json", "special_tokens_map.json")


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct, frozen=True):
    vocab: dict[str, int] | list[tuple[str, float]] = {}  # with scores in unigram models


class _TokenizerFile(msgspec.Struct):
    """What is read of tokenizer.json (vocabularies of 10 MB take 0.1 s this way)."""

    added_tokens: list[_AddedToken] = []
    model: _Model = _Model()


def read_tokenizer_eos(directory: Path) -> list[int]:
    """The id of the end-of-sequence token that the tokenizer in `directory` names; empty when there is none.

    ValueError, naming the file, for files that cannot be read.
    """
    name = _eos_name(directory)
    if name is None:
        return []
    if (directory / "tokenizer.json").exists():
        file = _read(directory / "tokenizer.json", _TokenizerFile)
        for token in file.added_tokens:
            if token.content == name:
                return [token.id]
        vocabulary = file.model.vocab
        if isinstance(vocabulary, list):
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    else:
        vocabulary = {}
        for each in ("vocab.json", "added_tokens.json"):
            if (directory / each).exists():
                vocabulary |= _read(directory / each, dict[str, int])
    return [vocabulary[name]] if name in vocabulary else []


def _eos_name(directory: Path) -> str | None:
    for file in _NAMED_IN:
        if (directory / file).exists():
            token = read_object(directory / file).get("eos_token")
            if isinstance(token, dict):  # with how it is matched in text
                token = token.get("content")
            if isinstance(token, str):
                return token
    return None


def _read(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again.") from error
