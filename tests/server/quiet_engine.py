"""What the frame of the server uses of `AsyncLLM`, without requests: its state, its status, and its end."""

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from fastapi import FastAPI

from hetis.core.config import EngineConfig
from hetis.core.messages import EngineStatus
from hetis.server.app import build_app
from hetis.server.context import Server
from hetis.server.options import ServerOptions


class QuietEngine:
    """- answer: what `ask` awaits; None: the driver does not answer."""

    def __init__(self, **options: Any) -> None:
        self.config = EngineConfig(**options)
        self.is_ready = True
        self.tokenizer = None
        self.dead_reason: str | None = None
        self.status: EngineStatus | None = None
        self.answer: Callable[[], Awaitable[EngineStatus]] | None = None
        self.num_asked = 0
        self.num_aborts = 0
        self.is_closed = False

    async def ask(self, question: object, kind: type[EngineStatus]) -> EngineStatus:
        self.num_asked += 1
        assert self.answer is not None
        return await self.answer()

    def abort_all(self) -> None:
        self.num_aborts += 1

    def close(self) -> None:
        self.is_closed = True


def frame(**options: Any) -> tuple[QuietEngine, FastAPI, Server]:
    """(engine, application, what handlers share) with these `ServerOptions`."""
    engine = QuietEngine()
    app = build_app(engine, ServerOptions(**options))  # type: ignore[arg-type]
    return engine, app, app.state.server


def paths_of(app: FastAPI) -> set[str]:
    """Of all routes, also those that the schema does not show."""
    found, routers = set(), [app.router]
    while routers:
        for route in routers.pop().routes:
            router = getattr(route, "original_router", None)  # of one that was included
            if router is not None:
                routers.append(router)
            else:
                found.add(str(route.path))  # type: ignore[attr-defined]
    return found


def http_client(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server", timeout=30, **options)
