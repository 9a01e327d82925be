"""Options of `LLM`, in the forms that users give, as an `EngineConfig`."""

from pathlib import PurePath
from typing import Any, get_args

import msgspec

from hetis.core.config import EngineConfig
from hetis.core.sizes import parse_bytes


def make_config(**options: Any) -> EngineConfig:
    """The configuration of a fleet. Paths become text, and sizes such as "2GiB" become bytes.

    Raises ValueError for an unknown option and for a value of the wrong type or out of range.
    """
    unknown = sorted(set(options) - set(EngineConfig.__struct_fields__))
    if unknown:
        raise ValueError(f"LLM has no option {unknown[0]}; known: {', '.join(EngineConfig.__struct_fields__)}.")
    options = {name: str(value) if isinstance(value, PurePath) else value for name, value in options.items()}
    options["kv_cache_memory"] = _bytes_of_ranks(options.get("kv_cache_memory"))
    for field in msgspec.structs.fields(EngineConfig):
        try:
            msgspec.convert(options.get(field.name, field.default), field.type)
        except msgspec.ValidationError as error:
            known = [choice for choice in get_args(field.type) if isinstance(choice, str)]  # of a Literal
            allowed = f"known: {', '.join(known)}" if known else str(error).partition(" - at ")[0]
            raise ValueError(f"{field.name} is {options[field.name]!r}; {allowed}.") from None
    return EngineConfig(**options)


def _bytes_of_ranks(memory: Any) -> int | dict[int, int] | None:
    """Bytes of KV cache for every rank or by rank; None if not given."""
    if memory is None:
        return None
    if not isinstance(memory, dict):
        return parse_bytes(memory)
    for rank in memory:
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise ValueError(f"kv_cache_memory names rank {rank!r}; give ranks as integers from 0.")
    return {rank: parse_bytes(size) for rank, size in memory.items()}
