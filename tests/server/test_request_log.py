"""The log line of a request: id, route, status, tokens, time; and nothing that a client wrote into its text."""

import asyncio
import logging
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from hetis.server.request_log import LONGEST_ID
from tests.server.quiet_engine import frame, http_client

SECRET = "the-text-of-a-prompt"


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("hetis").propagate = True
    caplog.set_level(logging.DEBUG, "hetis")
    return caplog


def app_with_routes() -> FastAPI:
    _, app, _ = frame()

    @app.post("/things/{name}")
    async def thing(name: str, request: Request) -> str:
        entry = request.state.access
        entry.prompt_tokens, entry.output_tokens, entry.reason = 12, 34, "length"
        return entry.request_id

    @app.post("/fails")
    async def fails() -> None:
        raise KeyError(SECRET)

    @app.post("/breaks")
    async def breaks() -> StreamingResponse:
        async def parts() -> Any:
            yield b"begin"
            raise KeyError(SECRET)

        return StreamingResponse(parts())

    return app


def ask(method: str, path: str, **options: Any) -> httpx.Response:
    async def request() -> httpx.Response:
        async with http_client(app_with_routes()) as client:
            return await client.request(method, path, **options)

    return asyncio.run(request())


def test_the_line_names_route_status_tokens_time_and_id(records: pytest.LogCaptureFixture) -> None:
    found = ask("POST", f"/things/{SECRET}?q={SECRET}", headers={"X-Request-Id": "abc-1"}, content=SECRET)
    assert found.json() == "abc-1" == found.headers["x-request-id"]
    [record] = [record for record in records.records if record.name == "hetis.access"]
    line = r"POST /things/\{name\} 200 in \d+\.\d{3} s, 12 \+ 34 tokens, length, id abc-1, from 127.0.0.1"
    assert re.fullmatch(line, record.getMessage())
    assert record.__dict__["fields"]["output_tokens"] == 34
    assert SECRET not in records.text


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("req_1.a:b-C", "req_1.a:b-C"),
        ("with space\tand%0d\u00e4", "withspaceand0d"),
        ('{"a": 1}', "a:1"),
        ("x" * 1000, "x" * LONGEST_ID),
    ],
)
def test_ids_of_clients_are_cut_and_cleaned(given: str, kept: str) -> None:
    found = ask("POST", "/things/a", headers={"X-Request-Id": given.encode()})
    assert found.headers["x-request-id"] == kept


@pytest.mark.parametrize("given", [None, "", "  ", "\u00e4"])
def test_a_request_without_a_usable_id_gets_one(given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given.encode()}
    ids = {ask("POST", "/things/a", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("1.2.3.4\nINFO a line, of its own" + "x" * 200, "1.2.3.4INFOalineofitsown" + "x" * 40),
        ("???", "an unknown address"),
    ],
)
def test_addresses_that_a_proxy_states_are_cut_and_cleaned(
    given: str, shown: str, records: pytest.LogCaptureFixture
) -> None:
    async def request() -> None:
        transport = httpx.ASGITransport(app=app_with_routes(), client=(given, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await client.get("/version")

    asyncio.run(request())
    assert records.messages[-1].endswith(f", from {shown}")


def test_a_failure_is_a_500_without_its_text_and_the_log_has_type_and_place(records: pytest.LogCaptureFixture) -> None:
    found = ask("POST", "/fails")
    assert found.status_code == 500
    assert found.json()["error"]["type"] == "server_error"
    assert found.headers["x-request-id"]
    for text in (found.text, records.text):
        assert SECRET not in text
    [error] = [record.getMessage() for record in records.records if record.levelname == "ERROR"]
    assert error.endswith("KeyError")
    assert "in fails" in error
    assert "Traceback" not in found.text
    assert ".py" not in found.text


def test_a_stream_that_breaks_stays_incomplete(records: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AssertionError):  # of the transport: an answer without an end
        ask("POST", "/breaks")
    assert SECRET not in records.text
    [line] = [record.getMessage() for record in records.records if record.name == "hetis.access"]
    assert ", disconnected, id " in line


def test_unknown_routes_are_logged_as_they_came_and_cut(records: pytest.LogCaptureFixture) -> None:
    ask("GET", "/a%0aINFO" + "b" * 1000)
    [line] = [record.getMessage() for record in records.records if record.name == "hetis.access"]
    assert line.startswith("GET /a%0aINFObbb")
    assert len(line) < 300


def test_probes_are_logged_when_debugging_only(records: pytest.LogCaptureFixture) -> None:
    for path in ("/livez", "/readyz", "/version"):
        ask("GET", path)
    levels = [record.levelname for record in records.records if record.name == "hetis.access"]
    assert levels == ["DEBUG", "DEBUG", "INFO"]


def test_the_text_of_a_query_is_never_logged(records: pytest.LogCaptureFixture) -> None:
    ask("GET", f"/version?key={SECRET}")
    ask("GET", f"/nothing?key={SECRET}")
    assert SECRET not in records.text
