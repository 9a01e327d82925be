"""Keys: which routes need one, in which forms it comes, and that comparisons take the same time for all keys."""

import ast
import asyncio
import base64
import hmac
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from hetis.server import auth
from hetis.server.options import digest
from tests.server.quiet_engine import frame, http_client, paths_of

KEYS = ("first-key", "second-key")
DIGESTS = tuple(map(digest, KEYS))
OPEN = {"/livez", "/readyz", "/health", "/ping"}  # documented in docs/serving.md
NO_ROUTES = ("/docs", "/redoc", "/v1", "/no/such/route", "/livez/", "//livez", "/health/../version", "/Livez")


def basic(password: str, name: str = "user") -> str:
    return f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"


def test_every_route_but_the_documented_ones_needs_a_key() -> None:
    _, app, _ = frame(api_key_digests=DIGESTS)

    async def check() -> None:
        async with http_client(app) as client:
            paths = paths_of(app)
            assert paths >= OPEN | {"/version", "/openapi.json"}
            for path in [*paths, *NO_ROUTES]:
                for method in ("GET", "POST", "OPTIONS", "DELETE", "HEAD"):
                    found = await client.request(method, path)
                    assert (found.status_code == 401) == (path not in OPEN), (method, path, found.status_code)

    asyncio.run(check())
    assert OPEN == auth.OPEN_PATHS


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEYS[0]}", 200),
        (f"bearer   {KEYS[1]} ", 200),
        (basic(KEYS[1]), 200),
        (basic(KEYS[0], ""), 200),
        (KEYS[0], 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (f"Bearer {KEYS[0]}x", 401),
        (f"Bearer {KEYS[0][:-1]}", 401),
        (f"Token {KEYS[0]}", 401),
        (f"Basic {KEYS[0]}", 401),
        ("Basic ====", 401),
        (basic(f"{KEYS[0]}:"), 401),
        ("Basic " + base64.b64encode(b"\xff\xfe").decode(), 401),
    ],
)
def test_a_key_is_a_bearer_token_or_a_password(header: str, status: int) -> None:
    _, app, _ = frame(api_key_digests=DIGESTS)

    async def ask() -> int:
        async with http_client(app) as client:
            return (await client.get("/version", headers={"Authorization": header})).status_code

    assert asyncio.run(ask()) == status


def test_a_refusal_has_openais_shape_and_names_the_scheme() -> None:
    _, app, _ = frame(api_key_digests=DIGESTS)

    async def ask() -> None:
        async with http_client(app) as client:
            found = await client.get("/version")
            assert found.json()["error"]["code"] == "invalid_api_key"
            assert found.headers["www-authenticate"] == "Bearer"
            found = await client.get("/version", headers={"Accept": "text/html,*/*"})
            assert found.headers["www-authenticate"].startswith('Basic realm="hetis')

    asyncio.run(ask())


def test_the_prefix_of_a_proxy_opens_no_other_route() -> None:
    _, app, _ = frame(api_key_digests=DIGESTS, root_path="/llm")

    async def check() -> None:
        async with http_client(app) as client:
            for path, status in (("/llm/livez", 200), ("/livez", 200), ("/llm/version", 401), ("/version", 401)):
                assert (await client.get(path)).status_code == status, path
            assert (await client.get("/llmlivez")).status_code == 401

    asyncio.run(check())


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key, found in ((KEYS[0], True), (KEYS[1], True), ("other", False)):
        compared.clear()
        assert auth.is_known(digest(key), DIGESTS) is found
        assert compared == [*DIGESTS]


def test_keys_are_compared_by_nothing_else() -> None:
    tree = ast.parse(Path(auth.__file__).read_text())
    [function] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "is_known"]
    assert not [node for node in ast.walk(function) if isinstance(node, ast.Compare)]
    assert "digest" in ast.unparse(function)


def test_websockets_are_closed() -> None:
    sent = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("reached without a key")

    async def send(message: object) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "headers": []}
    asyncio.run(auth.Authentication(app, DIGESTS)(scope, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]
