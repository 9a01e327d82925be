"""Token ids that end a sequence, as the configs of a checkpoint and its tokenizer name them.

Fine-tunes for chat often change the end-of-sequence token in the tokenizer and not in the configs.
"""

import logging
from pathlib import Path
from typing import Any

import msgspec

from hetis.models.json_files import read_object, shown

_CONFIGS = ("generation_config.json", "config.json")  # the first one with a usable id counts
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")  # the first one that names the token counts

_logger = logging.getLogger(__name__)


# --- configs ----------------------------------------------------------------------------------------------------------


def read_eos_token_ids(directory: Path | str, vocab_size: int) -> list[int]:
    """Ids that end a sequence by generation_config.json, else by config.json; empty if neither has one.

    Values that are no id of the vocabulary are dropped with a warning in the log. Raises ValueError for a file that is
    not a JSON object.
    """
    for name in _CONFIGS:
        path = Path(directory) / name
        if path.exists():
            ids = _usable(path, read_object(path).get("eos_token_id"), vocab_size)
            if ids:
                return ids
    return []


def _usable(path: Path, value: Any, vocab_size: int) -> list[int]:
    """Ids of the vocabulary in `value` (null, an id, a list of ids), in order and without repetition."""
    if value is None:
        return []
    given = value if isinstance(value, list) else [value]
    usable: list[int] = []
    dropped: list[Any] = []
    for token_id in given:
        is_usable = type(token_id) is int and 0 <= token_id < vocab_size
        (usable if is_usable else dropped).append(token_id)
    if dropped:
        _logger.warning(
            "%s: eos_token_id %s is ignored: the ids of the vocabulary are 0 to %d.",
            path,
            ", ".join(map(shown, dropped)),
            vocab_size - 1,
        )
    return list(dict.fromkeys(usable))


# --- tokenizer --------------------------------------------------------------------------------------------------------


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct, frozen=True):
    vocab: dict[str, int] | list[tuple[str, float]] = {}  # a list, with scores, in unigram models


class _TokenizerFile(msgspec.Struct):
    """The keys of tokenizer.json that are read (a vocabulary of 10 MB takes 0.1 s this way)."""

    added_tokens: list[_AddedToken] = []
    model: _Model = _Model()


def read_tokenizer_eos(directory: Path) -> list[int]:
    """Id of the end-of-sequence token that the tokenizer in `directory` names; empty if it names none.

    Raises ValueError, naming the file, for files that cannot be read.
    """
    name = _eos_name(directory)
    if name is None:
        return []
    token_id = _token_ids(directory).get(name)
    return [] if token_id is None else [token_id]


def _eos_name(directory: Path) -> str | None:
    for file in _TOKENIZER_CONFIGS:
        if (directory / file).exists():
            token = read_object(directory / file).get("eos_token")
            if isinstance(token, dict):  # an added token with its matching rules
                token = token.get("content")
            if isinstance(token, str):
                return token
    return None


def _token_ids(directory: Path) -> dict[str, int]:
    """Id of every token, from tokenizer.json or from the files of older tokenizers."""
    if not (directory / "tokenizer.json").exists():
        ids: dict[str, int] = {}
        for name in ("vocab.json", "added_tokens.json"):
            if (directory / name).exists():
                ids |= _read(directory / name, dict[str, int])
        return ids
    file: _TokenizerFile = _read(directory / "tokenizer.json", _TokenizerFile)
    vocabulary = file.model.vocab
    if isinstance(vocabulary, list):
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    return vocabulary | {token.content: token.id for token in reversed(file.added_tokens)}  # the first of equals counts


def _read(path: Path, kind: Any) -> Any:
    """Value of type `kind` in a JSON file. Raises ValueError, naming the file, for anything else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again.") from error
