"""Limits of headers and bodies, against a plain reference, and that what is refused is never parsed."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from hetis.server.errors import ApiError
from hetis.server.limits import (
    MAX_DEPTH,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_STRUCTURE,
    BodyLimits,
    check_structure,
    header_error,
)
from tests.server.quiet_engine import frame, http_client

LIMIT = 2000


def depth_of(value: Any) -> int:
    """Of lists and objects in one another."""
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 0


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(alphabet='[]{}"\\,:a\n日', max_size=200),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[]{}"\\a', max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(JSON, st.integers(0, MAX_DEPTH + 3), st.booleans())
def test_the_depth_of_json_is_that_of_the_parsed_value(value: Any, levels: int, ascii_only: bool) -> None:
    for level in range(levels):
        value = [value] if level % 2 else {"]": value}
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    if depth_of(value) > MAX_DEPTH:
        with pytest.raises(ApiError, match="nested"):
            check_structure(body)
    else:
        check_structure(body)


@pytest.mark.parametrize(
    ("body", "is_refused"),
    [
        (b"[" * (MAX_DEPTH + 1), True),
        (b"[" * 100_000, True),
        (b'{"a":' * 100_000, True),
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, False),
        (b'"' + b"[" * 100_000 + b'"', False),
        (b'"' + b"[" * 100_000, False),
        (b'"\\"' + b"[" * 100_000 + b'"', False),
        (b'"\\\\"' + b"[" * 100_000, True),
        (b"[]," * (MAX_STRUCTURE // 2), False),
        (b"[]," * (MAX_STRUCTURE // 2 + 1), True),
        (b'"",' * (MAX_STRUCTURE // 2 + 1) + b"[]" * 50, True),
        (b"]" * 1000 + b"[" * 100, False),
        (b"", False),
        (b"\xff\x00" * 1000, False),
    ],
)
def test_bodies_that_cost_much_to_parse_are_refused(body: bytes, is_refused: bool) -> None:
    if is_refused:
        with pytest.raises(ApiError) as error:
            check_structure(body)
        assert error.value.status == 400
    else:
        check_structure(body)


def echo() -> Starlette:
    """Answers with the length of the body."""

    async def answer(request: Request) -> JSONResponse:
        return JSONResponse(len(await request.body()))

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    app.add_middleware(BodyLimits, max_bytes=LIMIT)
    return app


async def chunks(sizes: list[int], taken: list[int]) -> AsyncIterator[bytes]:
    for size in sizes:
        taken.append(size)
        yield b"x" * size


@pytest.mark.parametrize(
    ("sizes", "status"),
    [([], 200), ([0], 200), ([LIMIT], 200), ([1000, 1000], 200), ([LIMIT + 1], 413), ([999] * 9, 413)],
)
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_beyond_the_limit_is_refused(sizes: list[int], status: int, announced: bool) -> None:
    async def ask() -> None:
        async with http_client(echo()) as client:  # type: ignore[arg-type]
            content: Any = b"x" * sum(sizes) if announced else chunks(sizes, [])
            found = await client.post("/", content=content)
            assert found.status_code == status
            if status == 200:
                assert found.json() == sum(sizes)
            else:
                assert found.json()["error"]["message"].startswith("the body is larger than 1.95 KiB")

    asyncio.run(ask())


def test_chunks_beyond_the_limit_are_not_read() -> None:
    read = []

    async def receive() -> dict[str, Any]:
        read.append(1)
        return {"type": "http.request", "body": b"x" * 999, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        raise AssertionError("reached")

    sent: list[Any] = []
    headers = [(b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(BodyLimits(app, LIMIT)(scope, receive, send))  # type: ignore[arg-type]
    assert (sent[0]["status"], len(read)) == (413, 3)


def test_a_client_that_leaves_while_it_sends_reaches_nothing() -> None:
    messages = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def fail(*_: Any) -> None:
        raise AssertionError("reached")

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"9")]}
    asyncio.run(BodyLimits(fail, LIMIT)(scope, receive, fail))  # type: ignore[arg-type]
    assert not messages


@pytest.mark.parametrize(
    ("headers", "query", "is_refused"),
    [
        ([], 0, False),
        ([(b"x", b"y" * (MAX_HEADER_BYTES - 2))], 0, False),
        ([(b"x", b"y" * (MAX_HEADER_BYTES - 1))], 0, True),
        ([(b"x", b"")] * MAX_HEADERS, 0, False),
        ([(b"x", b"")] * (MAX_HEADERS + 1), 0, True),
        ([], MAX_HEADER_BYTES - 1, False),
        ([], MAX_HEADER_BYTES, True),
    ],
)
def test_headers_and_urls_beyond_the_limits_are_refused(
    headers: list[tuple[bytes, bytes]], query: int, is_refused: bool
) -> None:
    scope = {"type": "http", "headers": headers, "raw_path": b"/", "query_string": b"q" * query}
    error = header_error(scope)
    assert (error is not None) is is_refused
    assert error is None or error.status == 431


def test_the_limits_hold_for_the_whole_application_and_before_its_routes() -> None:
    _, app, _ = frame(max_body_bytes=LIMIT)

    async def ask() -> None:
        async with http_client(app) as client:
            for path in ("/v1/completions", "/ping", "/no/such/route"):
                found = await client.post(path, content=b"x" * (LIMIT + 1))
                assert (found.status_code, found.json()["error"]["type"]) == (413, "invalid_request_error"), path
                found = await client.post(path, content=b"[" * LIMIT)
                assert found.status_code == 400, path
                assert "nested" in found.json()["error"]["message"]

    asyncio.run(ask())
