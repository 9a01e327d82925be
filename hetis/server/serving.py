"""The life of the server process: listens, starts the fleet, serves, drains on a signal, ends the fleet.

Signals: the first SIGTERM or SIGINT drains. `/readyz` and new requests then get 503, running requests may finish
within the shutdown timeout, and what is left is aborted. A second signal aborts at once.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import uvicorn

from hetis.frontend.async_llm import AsyncLLM
from hetis.frontend.errors import EngineDeadError
from hetis.server import listener as listeners
from hetis.server.app import build_app
from hetis.server.connection import KEEP_ALIVE_SECONDS, Connection
from hetis.server.context import Server
from hetis.server.options import ServerOptions
from hetis.server.start_report import report_defaults, report_ready

ABORT_SECONDS = 2.0  # that aborted requests have to send their last words
FLUSH_SECONDS = 3  # that clients have to read the ends of answers
_DATE_SECONDS = 1.0  # between updates of the header Date
_POLL_SECONDS = 0.05  # while the server drains
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger("hetis")


def serve(options: ServerOptions, engine: dict[str, Any]) -> int:
    """Serves until a signal or the end of the fleet; returns the exit code. `engine`: keyword arguments of `AsyncLLM`.

    0: ended by a signal, all requests finished or aborted in order; 1: the fleet has ended, the log has the reason;
    128 + n: forced by signal n. Raises ValueError for what can be refused before the fleet starts.
    """
    listener = listeners.listen(options)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(listener, options, engine))
    finally:
        listener.close()
        listeners.remove(options)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, if it is there."""
    if find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


async def _serve(listener: socket.socket, options: ServerOptions, engine: dict[str, Any]) -> int:
    llm = AsyncLLM(**engine)
    try:
        app = build_app(llm, options)
        life = ServerLife(app.state.server, HttpServer(_uvicorn_config(app, options)))
        return await life.run(listener)
    finally:
        await asyncio.to_thread(llm.close)


def _uvicorn_config(app: Any, options: ServerOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,  # its loggers are set up like all others
        access_log=False,
        server_header=False,
        backlog=listeners.BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=options.ssl_cert_reqs,
    )


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, and without its timer of 0.1 s."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

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


class ServerLife:
    """From the first request to the last, in one event loop."""

    def __init__(self, server: Server, http: HttpServer) -> None:
        self._server, self._http = server, http
        self._ending = asyncio.Event()  # by a signal, or since the fleet has ended
        self._forced = asyncio.Event()
        self._code = 0

    async def run(self, listener: socket.socket) -> int:
        """Serves on `listener`; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        http = asyncio.create_task(self._http.serve([listener]))
        fleet = asyncio.create_task(self._follow_fleet(listener))
        for task in (http, fleet):
            task.add_done_callback(lambda _: self._ending.set())
        await self._ending.wait()
        await self._drain()
        fleet.cancel()
        self._http.stop(0 if self._forced.is_set() else FLUSH_SECONDS)
        for result in await asyncio.gather(http, fleet, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        return self._code

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._ending.is_set():
            count = self._server.admission.num_sequences
            seconds = self._server.options.shutdown_timeout
            _log.info("%s: ending; %d running sequences have %g s to finish.", number.name, count, seconds)
            self._ending.set()
        elif not self._forced.is_set():
            _log.warning("%s again: ending without waiting for requests.", number.name)
            self._code = self._code or 128 + number
            self._forced.set()

    async def _follow_fleet(self, listener: socket.socket) -> None:
        """From the start of the fleet to its end."""
        server = self._server
        report_defaults(server)
        try:
            await server.llm.wait_until_ready()
            report_ready(server, listeners.url_of(listener, server.options))
            await server.health.run()
            reason = server.llm.dead_reason
        except EngineDeadError as error:
            reason = str(error)
        _log.error("%s", reason)
        self._code = 1

    async def _drain(self) -> None:
        """Waits for running requests, and aborts those that the timeout or a second signal leaves unfinished."""
        server = self._server
        server.is_draining = True
        seconds = server.options.shutdown_timeout if self._code == 0 else ABORT_SECONDS
        await self._wait_for_requests(seconds)
        if server.admission.num_sequences and server.llm.dead_reason is None:
            _log.warning("%d unfinished sequences are aborted.", server.admission.num_sequences)
            server.llm.abort_all()
            self._forced.clear()
            await self._wait_for_requests(ABORT_SECONDS)

    async def _wait_for_requests(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while self._server.admission.num_sequences and not self._forced.is_set():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return
            await wait_for_event(self._forced, min(left, _POLL_SECONDS))


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Waits until `event` is set, or `seconds` have passed."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return
