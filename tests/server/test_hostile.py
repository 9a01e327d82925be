"""Hostile requests: each is refused by a sentence that names the field, and a stream beside them is not disturbed."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.server.stand_in import TEMPLATE, StandIn, app_of, events, http_client, post

HUGE = 10**9
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


FIELDS: list[tuple[str, Any]] = [  # of both endpoints
    ("n", HUGE),
    ("n", 10**400),
    ("n", float("nan")),
    ("n", 1e300),
    ("n", [1] * 1000),
    ("n", {"$gt": 0}),
    ("max_tokens", 2**63),
    ("max_tokens", -(2**63)),
    ("max_tokens", 1e999),
    ("max_tokens", 2**62),
    ("min_tokens", 2**31),
    ("min_tokens", 2**70),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", float("-inf")),
    ("temperature", 1e308),
    ("temperature", "0.5"),
    ("top_p", float("nan")),
    ("top_p", -0.0),
    ("top_p", 1e-400),
    ("top_k", 2**64),
    ("top_k", float("inf")),
    ("min_p", float("nan")),
    ("presence_penalty", float("nan")),
    ("frequency_penalty", float("inf")),
    ("repetition_penalty", float("inf")),
    ("repetition_penalty", 1e999),
    ("repetition_penalty", float("nan")),
    ("repetition_penalty", -1),
    ("repetition_penalty", 10**400),
    ("seed", 2**64),
    ("seed", -(2**64)),
    ("seed", 1e400),
    ("seed", "DROP TABLE"),
    ("stop", ["x"] * 100_000),
    ("stop", [str(index) for index in range(100_000)]),
    ("stop", "x" * 1_000_000),
    ("stop", ["\ud800"]),
    ("stop", [None]),
    ("stop", [[]]),
    ("stop", {"a": "b"}),
    ("stop", nested(50)),
    ("stop_token_ids", list(range(100_000))),
    ("stop_token_ids", [2**31]),
    ("stop_token_ids", [2**64]),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", [None]),
    ("logit_bias", {str(index): 1 for index in range(50_000)}),
    ("logit_bias", {"99999999": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1": float("nan")}),
    ("logit_bias", {"1": None}),
    ("logit_bias", {"1": {}}),
    ("logit_bias", {"\ud800": 1}),
    ("logit_bias", {"": 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("prompt_logprobs", 10**6),
    ("prompt_logprobs", -1),
    ("stream_options", {"include_usage": "yes"}),
    ("stream_options", [{}]),
    ("stream_options", {"include_usage": False}),
    ("user", "x" * 1_000_000),
    ("user", {"a": 1}),
    ("metadata", [1]),
    ("best_of", HUGE),
    ("use_beam_search", True),
    ("guided_regex", "(a+)+$" * 1000),
    ("guided_json", {"type": "object"}),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("structured_outputs", {"regex": "(((((a*)*)*)*)*"}),
    ("logits_processors", ["os.system"]),
    ("chat_template", "{% for i in range(10**9) %}x{% endfor %}"),
    ("prompt_embeds", "gASVAAAA"),
    ("kv_transfer_params", {"remote": "http://169.254.169.254"}),
]
OF_COMPLETIONS: list[tuple[str, Any]] = [
    ("logprobs", 10**6),
    ("logprobs", 2**63),
    ("echo", "true"),
    ("suffix", "x"),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", None),
    ("prompt", {}),
    ("prompt", "\ud800"),
    ("prompt", "a\udfffb"),
    ("prompt", [2**31]),
    ("prompt", [2**64]),
    ("prompt", [-1]),
    ("prompt", [1e300]),
    ("prompt", [[1], "a", 5]),
    ("prompt", [1] * 100_000),
    ("prompt", ["x"] * 10_000),
    ("prompt", "word " * 1100),
    ("prompt", "x" * 1_000_000),
    ("prompt", nested(40)),
    ("prompt", [[[1]]]),
    ("prompt", [{"prompt": "x"}]),
]
OF_CHAT: list[tuple[str, Any]] = [
    ("top_logprobs", 10**6),
    ("messages", []),
    ("messages", [{}]),
    ("messages", [nested(10)]),
    ("messages", [{"role": "user", "content": "\ud800"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}]),
    ("messages", [{"role": "thief", "content": "x"}]),
    ("messages", [{"role": "user", "content": "word " * 1100}]),
    ("messages", [{"role": ["user"], "content": "x"}]),
    ("chat_template_kwargs", {"tokenize": True}),
    ("chat_template_kwargs", {"conversation": []}),
    ("chat_template_kwargs", {"return_tensors": "pt"}),
    ("chat_template_kwargs", {"__globals__": {}}),
    ("chat_template_kwargs", {"self": 1}),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": nested(20)}}]),
    ("tool_choice", "required"),
    ("audio", {"voice": "x"}),
]
LLM = StandIn()
APP = app_of(LLM, chat_template=TEMPLATE, max_body_bytes=4 << 20)


def check(path: str, body: Any, field: str) -> None:
    response = post(APP, path, body)
    assert 400 <= response.status_code < 500, response.text[:300]
    assert response.status_code != 422
    error = response.json()["error"]
    assert error["param"] == field, error
    assert field in error["message"]
    assert len(response.content) < 1000, "what a client sent is not sent back"
    assert not any(word in response.text for word in ("Traceback", "0x", "pydantic", "jinja", "msgspec", "Error("))
    assert LLM.num_running == 0
    assert APP.state.server.admission.num_sequences == 0


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=[f"{field}-{n}" for n, (field, _) in enumerate(FIELDS)])
def test_fields(field: str, value: Any) -> None:
    if field != "chat_template":  # unknown to completions, and refused as such
        check(COMPLETIONS, {"prompt": "x", "max_tokens": 2, field: value}, field)
    if field != "prompt_embeds":
        check(CHAT, {"messages": USER, "max_tokens": 2, field: value}, field)


def test_fields_of_completions() -> None:
    for field, value in OF_COMPLETIONS:
        check(COMPLETIONS, {"prompt": "x", "max_tokens": 2, field: value}, field)


def test_fields_of_chat() -> None:
    for field, value in OF_CHAT:
        check(CHAT, {"messages": USER, "max_tokens": 2, "logprobs": True, field: value}, field)


def test_more_sequences_than_the_server_holds() -> None:
    check(COMPLETIONS, {"prompt": ["x"] * 1000, "n": 16, "max_tokens": 2}, "n")


def test_a_zero_byte_is_text() -> None:
    assert post(APP, COMPLETIONS, {"prompt": "a\x00b", "max_tokens": 1}).status_code == 200
    assert post(APP, CHAT, {"messages": [{"role": "user", "content": "\x00"}], "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"5",
        b"\xff\xfe",
        b'{"a": 1,}',
        b'{"prompt": "\xff"}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": "x" "max_tokens": 1}',
        b"{'prompt': 'x'}",
        b"prompt=x",
    ],
    ids=lambda body: str(body[:12]),
)
def test_bodies_that_are_no_object(path: str, body: bytes) -> None:
    response = post(APP, path, body)
    assert response.status_code == 400, response.text
    assert "body" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data", "json"])
def test_other_content_types(kind: str) -> None:
    response = post(APP, COMPLETIONS, {"prompt": "x"}, headers={"content-type": kind})
    assert response.status_code == 415
    assert "Content-Type" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_content_types_of_json(kind: str) -> None:
    assert post(APP, COMPLETIONS, {"prompt": "x"}, headers={"content-type": kind}).status_code == 200


def test_a_body_that_is_too_large() -> None:
    response = post(APP, COMPLETIONS, json.dumps({"prompt": "x" * (5 << 20)}).encode())
    assert response.status_code == 413


def test_a_stream_beside_hostile_requests_is_not_disturbed() -> None:
    body = {"prompt": "Hello", "max_tokens": 200, "stream": True, "seed": 3}
    undisturbed = [chunk["choices"] for chunk in events(post(APP, COMPLETIONS, body).text)]

    async def hostile(client: httpx.AsyncClient) -> None:
        for field, value in FIELDS[::3]:
            content = json.dumps({"prompt": "x", field: value}).encode()
            await client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})

    async def run() -> str:
        async with http_client(APP) as client:
            benign, *_ = await asyncio.gather(client.post(COMPLETIONS, json=body), hostile(client), hostile(client))
            return benign.text

    assert [chunk["choices"] for chunk in events(asyncio.run(run()))] == undisturbed
