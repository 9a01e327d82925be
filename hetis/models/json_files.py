"""JSON files of a checkpoint, decoded into typed structures. Every error is one sentence with key, value and remedy.

A structure is a `msgspec.Struct` whose fields have the types below; a type's description says what it accepts.
"""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

Json = dict[str, Any]
Structure = TypeVar("Structure", bound=msgspec.Struct)

_MAX_COUNT = 2**31 - 1
_MAX_TEXT = 80  # characters of a value in a sentence

_COUNT = f"a whole number from 1 to {_MAX_COUNT}"
Count = Annotated[int, Meta(ge=1, le=_MAX_COUNT, description=_COUNT)]
OptionalCount = Annotated[Count | None, Meta(description=f"{_COUNT}, or null")]
Number = Annotated[float, Meta(gt=0, le=1e30, description="a positive number up to 1e30")]
OptionalNumber = Annotated[Number | None, Meta(description="a positive number up to 1e30, or null")]
Flag = Annotated[bool, Meta(description="true or false, without quotes")]
OptionalFlag = Annotated[bool | None, Meta(description="true, false or null, without quotes")]
Text = Annotated[str, Meta(description="a text")]
OptionalText = Annotated[str | None, Meta(description="a text or null")]
OptionalTexts = Annotated[list[str] | None, Meta(description="a list of texts, or null")]
OptionalObject = Annotated[Json | None, Meta(description="an object or null")]


def read_object(path: Path) -> Json:
    """JSON object in the file at `path`. ValueError, one sentence with the path, if it cannot be read or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a byte order mark in front
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a directory with a Hugging Face checkpoint.") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read ({reason}); download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; download it again.")
    return value


def decode(kind: type[Structure], values: Json, prefix: str = "") -> Structure:
    """Structure that `values` describes; unknown keys are ignored.

    Raises ValueError, one sentence with `prefix` and key, the value and what is accepted, for the first field that is
    missing or not of its type. No value is converted, except whole numbers to floats.
    """
    decoded = {}
    for field in msgspec.structs.fields(kind):
        key = f"{prefix}{field.encode_name}"
        if field.encode_name in values:
            value = values[field.encode_name]
            try:
                decoded[field.name] = msgspec.convert(value, field.type)
            except (msgspec.ValidationError, ValueError, RecursionError):  # the others: lone surrogates, deep nesting
                raise ValueError(f"{key} is {shown(value)}; it must be {_accepted(field.type)}.") from None
        elif field.required:
            raise ValueError(f"{key} is missing; it must be {_accepted(field.type)}.")
    return kind(**decoded)


def shown(value: object) -> str:
    """Value as part of a sentence: its JSON text on one line, cut to 80 characters."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def _accepted(annotated: Any) -> str:
    return str(annotated.__metadata__[-1].description)
