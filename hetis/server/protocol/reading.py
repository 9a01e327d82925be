"""From the bytes of a request to a checked structure. Every mistake is an `ApiError` that names the field."""

import json
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import msgspec
from starlette.requests import Request

from hetis.server.errors import ApiError, shown, wrong_value
from hetis.server.protocol.unsupported import check_unsupported

Json = dict[str, Any]


class Body(msgspec.Struct, kw_only=True, frozen=True):
    """Fields of a request. `unsupported`: fields that hetis does not have, see `check_unsupported`."""

    unsupported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {}


B = TypeVar("B", bound=Body)


async def read_json(request: Request) -> Json:
    """The JSON object in the body of a request. Raises ApiError 415 for other content types, 400 for other bodies."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        what = f"is {shown(kind)}" if kind else "is missing"
        raise ApiError(415, f"the header Content-Type {what}; send application/json.", code="unsupported_media_type")
    try:
        values = json.loads(await request.body())
    except (ValueError, RecursionError) as error:  # ValueError: bytes that are no UTF-8, numbers of over 4,300 digits
        where = f" at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not valid JSON{where}; send one JSON object.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body is {shown(values)}; send one JSON object.", code="invalid_json")
    return values


def parse(kind: type[B], values: Json) -> B:
    """The structure that `values` describes. A field that is null counts as left out.

    Raises ApiError 400 for the first field that is unknown, not supported, missing or not of its type. No value is
    converted, except whole numbers to floats.
    """
    fields, given = _fields(kind), {}
    for name, value in values.items():
        if name not in fields:
            check_unsupported(kind.unsupported, name, value)
        elif value is not None:
            given[fields[name].name] = _converted(name, value, fields[name].type)
    for name, field in fields.items():
        if field.required and field.name not in given:
            raise ApiError(400, f"{name} is missing; give {_allowed(field.type)}.", name)
    return kind(**given)


@lru_cache(maxsize=16)
def _fields(kind: type[Body]) -> dict[str, msgspec.structs.FieldInfo]:
    """By name in JSON."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def _converted(name: str, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, ValueError, RecursionError):  # the others: lone surrogates, deep nesting
        raise wrong_value(name, value, _allowed(kind)) from None


def _allowed(annotated: Any) -> str:
    return str(annotated.__metadata__[-1].description)
