"""What /openapi.json says of the routes: request bodies, answers, and errors."""

from typing import Any

import msgspec

from hetis.server.protocol.reading import Body
from hetis.server.protocol.unsupported import schema_of

Schema = dict[str, Any]
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "the field of the request that is at fault"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MEANINGS = {
    400: "The request is wrong or asks for what is not supported; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    405: "The path does not take this method.",
    413: "The request is too large.",
    415: "The content type is not application/json.",
    431: "The headers are too large.",
    500: "The server failed on this request.",
    503: "The queue is full, or the fleet is starting, ending or dead. `Retry-After` may say when to try again.",
}
_OF_GET = (401, 404, 405, 431, 503)


def errors(*statuses: int) -> dict[int | str, Schema]:
    """Error responses of a route, for FastAPI's `responses`."""
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


def answers(kind: type[msgspec.Struct], what: str, *, stream: str = "") -> dict[int | str, Schema]:
    """Responses of a route that answers with `kind`. `stream`: what its server-sent events are, if it has any."""
    content: Schema = {"application/json": {"schema": inlined(kind)}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string", "description": stream}}
    return {200: {"description": what, "content": content}}


def takes(*kinds: type[Body]) -> Schema:
    """The request body of a route that takes one of `kinds`, for FastAPI's `openapi_extra`."""
    schemas = [_body(kind) for kind in kinds]
    schema = schemas[0] if len(schemas) == 1 else {"oneOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


POST_ERRORS = errors(*_MEANINGS)
GET_ERRORS = errors(*_OF_GET)


def _body(kind: type[Body]) -> Schema:
    schema = inlined(kind)
    schema["properties"] |= schema_of(kind.unsupported)
    return schema | {"additionalProperties": {"type": "null"}}


def inlined(kind: type[msgspec.Struct]) -> Schema:
    """The JSON schema of a structure, with those of its parts in their places: a schema inside of /openapi.json has no
    definitions of its own."""
    root, parts = msgspec.json.schema_components((kind,), ref_template="{name}")

    def resolved(schema: Any) -> Any:
        if isinstance(schema, list):
            return [resolved(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        if isinstance(name := schema.get("$ref"), str):
            return resolved(parts[name])
        return {key: resolved(value) for key, value in schema.items() if key != "default" or value is not None}

    schema: Schema = resolved(root[0])
    return schema
