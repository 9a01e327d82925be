"""uvicorn in an event loop that others share: without its signal handlers and its timer of 0.1 s."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from hetis.server.connection import KEEP_ALIVE_SECONDS, Connection
from hetis.server.listener import BACKLOG
from hetis.server.options import ServerOptions

_DATE_SECONDS = 1.0  # between updates of the header Date


class HttpServer(uvicorn.Server):
    """Serves `app`, an attribute that may be replaced at any time; requests that run keep theirs."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self.app = app
        super().__init__(_config(self._route, options))
        self._stopping = asyncio.Event()

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    def stop(self, flush_seconds: int) -> None:
        """Ends `serve`: clients have so many seconds to read what has been written."""
        self.config.timeout_graceful_shutdown = flush_seconds
        self.should_exit = True
        self._stopping.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await wait_for_event(self._stopping, _DATE_SECONDS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _config(app: ASGIApp, options: ServerOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        interface="asgi3",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,  # its loggers are set up like all others
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=options.ssl_cert_reqs,
    )


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Waits until `event` is set, or `seconds` have passed."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return
