"""Which token ids end a sequence, as the files of a checkpoint say."""

import logging
from pathlib import Path
from typing import Any

from hetis.models.json_files import read_object, shown

_FILES = ("generation_config.json", "config.json")  # the first one that has a usable id counts

_logger = logging.getLogger(__name__)


def read_eos_token_ids(directory: Path | str, vocab_size: int) -> list[int]:
    """The ids that end a sequence: from generation_config.json, else config.json; empty when neither has one.

    What is no id of the vocabulary is left out, with a line in the log. Raises ValueError for a file that is not a JSON
    object.
    """
    for name in _FILES:
        path = Path(directory) / name
        if path.exists():
            ids = _usable(path, read_object(path).get("eos_token_id"), vocab_size)
            if ids:
                return ids
    return []


def _usable(path: Path, value: Any, vocab_size: int) -> list[int]:
    """The ids in `value` (null, an id, a list of ids) that the vocabulary has, in their order."""
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
            "%s: eos_token_id %s is left out: the ids of the vocabulary are 0 to %d.",
            path,
            ", ".join(map(shown, dropped)),
            vocab_size - 1,
        )
    return list(dict.fromkeys(usable))
