"""Requests by route, method and status: no client makes labels."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from hetis.server.http_metrics import HttpMetrics


def make_app(registry: CollectorRegistry) -> FastAPI:
    app = FastAPI()

    @app.get("/models/{name}")
    async def model(name: str) -> str:
        return name

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> object:
            yield b"one"
            raise RuntimeError("planted")

        return StreamingResponse(parts())  # type: ignore[arg-type]

    @app.get("/fails")
    async def fails() -> None:
        raise RuntimeError("planted")

    app.add_middleware(HttpMetrics, registry=registry, known=())
    return app


def counted(registry: CollectorRegistry) -> dict[tuple[str, str, str], float]:
    return {
        (sample.labels["handler"], sample.labels["method"], sample.labels["status"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "http_requests_total"
    }


def get(app: FastAPI, *calls: tuple[str, str]) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for method, path in calls:
                await client.request(method, path)

    asyncio.run(run())


def test_paths_are_counted_by_their_template() -> None:
    registry = CollectorRegistry()
    calls = [("GET", "/models/a"), ("GET", "/models/b?x=1"), ("GET", "/x"), ("GET", "/y"), ("POST", "/models/a")]
    get(make_app(registry), *calls)
    found = counted(registry)
    assert found[("/models/{name}", "GET", "200")] == 2
    assert found[("none", "GET", "404")] == 2
    assert sum(found.values()) == len(calls)
    assert len(found) == 3


def test_unknown_methods_share_a_label() -> None:
    registry = CollectorRegistry()
    get(make_app(registry), ("BREW", "/x"), ("SPLIT", "/x"))
    assert counted(registry) == {("none", "other", "404"): 2}


@pytest.mark.parametrize(("path", "status"), [("/fails", "500"), ("/stream", "200")])
def test_failures_have_the_status_that_the_client_has_seen(path: str, status: str) -> None:
    registry = CollectorRegistry()
    get(make_app(registry), ("GET", path))
    assert counted(registry) == {(path, "GET", status): 1}


def test_a_client_that_has_gone_before_the_status_is_499() -> None:
    registry = CollectorRegistry()

    async def silent(scope: Scope, receive: Receive, send: Send) -> None: ...

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None: ...

    asyncio.run(HttpMetrics(silent, registry, ())({"type": "http", "method": "GET", "path": "/"}, receive, send))
    assert counted(registry) == {("none", "GET", "499"): 1}
