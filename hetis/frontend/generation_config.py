"""Sampling defaults that the author of a model recommends in its generation_config.json."""

import logging
from typing import Any

from hetis.core.config import EngineConfig
from hetis.core.sampling_params import SamplingParams
from hetis.models.hub import resolve_model
from hetis.models.json_files import read_object

_FILE = "generation_config.json"
# name there: field of SamplingParams; the choice is vLLM's
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}

_log = logging.getLogger("hetis")


def sampling_defaults(config: EngineConfig) -> dict[str, float]:
    """Fields of `SamplingParams` that the model's generation_config.json sets; empty if there is no such file.

    A value that `SamplingParams` refuses is left out, with a warning. Raises ValueError for a file without an object.
    """
    path = resolve_model(config.model, config.revision, weights=False) / _FILE
    if not path.exists():
        return {}
    given: dict[str, Any] = read_object(path)
    found: dict[str, float] = {}
    for name, field in _FIELDS.items():
        if (value := given.get(name)) is None:
            continue
        try:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} is not a number.")
            one: dict[str, Any] = {field: value}
            SamplingParams(**one)
            found |= one
        except ValueError as error:
            _log.warning("%s: %s is ignored: %s", path, name, error)
    return found
