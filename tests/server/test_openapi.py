"""/openapi.json describes the requests and answers as they are."""

from typing import Any

import pytest

from hetis.server.protocol.chat import ChatRequest
from hetis.server.protocol.completions import CompletionRequest
from hetis.server.protocol.unsupported import CHAT, COMPLETIONS
from tests.server.stand_in import TEMPLATE, StandIn, app_of, get, post

APP = app_of(StandIn(), chat_template=TEMPLATE)
DOCUMENT = get(APP, "/openapi.json").json()
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


def request_schema(path: str) -> Any:
    return DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def references(value: Any) -> list[str]:
    if isinstance(value, list):
        return [found for item in value for found in references(item)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
    return own + [found for item in value.values() for found in references(item)]


def test_every_reference_has_a_target() -> None:
    for reference in references(DOCUMENT):
        target = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


@pytest.mark.parametrize("path", POSTS)
def test_statuses(path: str) -> None:
    statuses = set(DOCUMENT["paths"][path]["post"]["responses"])
    assert {"200", "400", "401", "404", "405", "413", "415", "503"} <= statuses
    assert "422" not in statuses


@pytest.mark.parametrize(
    ("path", "kind", "unsupported"),
    [("/v1/completions", CompletionRequest, COMPLETIONS), ("/v1/chat/completions", ChatRequest, CHAT)],
)
def test_every_field_is_described(path: str, kind: Any, unsupported: dict[str, Any]) -> None:
    schema = request_schema(path)
    assert set(schema["properties"]) == set(kind.__struct_fields__) | set(unsupported)
    assert schema["additionalProperties"] == {"type": "null"}
    assert all(field.get("description") for field in schema["properties"].values())
    for name, field in schema["properties"].items():
        assert name in schema["required"] or {"type": "null"} in field.get("anyOf", []) or None in field["enum"]


def allowed(schema: Any, value: Any) -> bool:
    """Whether a number is allowed by the schema of a field."""
    for one in schema["anyOf"]:
        if one["type"] == "null" or (one["type"] == "integer" and value != int(value)):
            continue
        low, exclusive = one.get("minimum"), one.get("exclusiveMinimum")
        if (low is None or value >= low) and (exclusive is None or value > exclusive) and value <= one["maximum"]:
            return True
    return False


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty"])
def test_limits_in_the_document_are_those_of_the_server(field: str) -> None:
    schema = request_schema("/v1/completions")["properties"][field]
    for value in (-3, -2, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3):
        response = post(APP, "/v1/completions", {"prompt": "a", "max_tokens": 1, field: value})
        assert (response.status_code == 200) == allowed(schema, value), (value, response.text)


def test_streams_are_described() -> None:
    for path in POSTS[:2]:
        content = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
