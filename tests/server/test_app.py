"""What holds for every answer: no CORS unless asked for, no pages of libraries, no outside resource."""

import asyncio
import re
from typing import Any

import httpx
import pytest

from tests.server.quiet_engine import frame, http_client, paths_of

ORIGIN = "https://chat.example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang, x-stainless-retry-count",
}


def ask(method: str, path: str, headers: dict[str, str], **options: Any) -> httpx.Response:
    async def request() -> httpx.Response:
        async with http_client(frame(**options)[1]) as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(request())


def cors(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


@pytest.mark.parametrize(("method", "headers"), [("GET", {"Origin": ORIGIN}), ("OPTIONS", PREFLIGHT)])
def test_there_is_no_cors_by_default(method: str, headers: dict[str, str]) -> None:
    for path in ("/livez", "/version", "/v1/completions", "/nothing"):
        assert cors(ask(method, path, headers)) == {}


def test_a_named_origin_may_use_the_server() -> None:
    chosen: dict[str, Any] = {"allowed_origins": (ORIGIN,), "api_key_digests": (b"x" * 32,)}
    found = ask("OPTIONS", "/v1/completions", PREFLIGHT, **chosen)
    assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, ORIGIN)
    allowed = {name.strip() for name in found.headers["access-control-allow-headers"].split(",")}
    assert {"authorization", "content-type", "x-stainless-lang", "x-stainless-retry-count"} <= allowed
    assert "access-control-allow-credentials" not in found.headers
    found = ask("GET", "/version", {"Origin": ORIGIN}, **chosen)
    assert found.status_code == 401, "a page can read why"
    assert found.headers["access-control-allow-origin"] == ORIGIN
    other = {"Origin": "https://evil.example"}
    assert "access-control-allow-origin" not in ask("GET", "/version", other, **chosen).headers
    assert ask("OPTIONS", "/v1/completions", PREFLIGHT | other, **chosen).status_code == 400


def test_no_route_shows_pages_that_load_from_elsewhere() -> None:
    _, app, _ = frame()
    assert paths_of(app).isdisjoint({"/docs", "/redoc", "/docs/oauth2-redirect"})
    schema = ask("GET", "/openapi.json", {})
    assert schema.status_code == 200
    assert not re.search(r"https?://", schema.text)


def test_the_schema_knows_the_prefix_of_a_proxy() -> None:
    assert ask("GET", "/openapi.json", {}, root_path="/llm").json()["servers"] == [{"url": "/llm"}]
