"""The life of the server process: listens, starts the fleet, serves, drains on a signal, ends the fleet.

Signals: the first SIGTERM or SIGINT drains. `/readyz` and new requests then get 503, running requests may finish
within the shutdown timeout, and what is left is aborted. A second signal aborts at once. What comes within a second of
the first one is the same request: Ctrl-C reaches a server under torchrun from the terminal and from torchrun.
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Never, TypeVar, cast

import msgspec

from hetis.core.config import EngineConfig
from hetis.core.messages import EngineStatus, Message
from hetis.frontend.async_llm import AsyncLLM
from hetis.frontend.errors import EngineDeadError
from hetis.frontend.options import make_config
from hetis.server import listener as listeners
from hetis.server.app import build_app
from hetis.server.context import Server
from hetis.server.http_server import HttpServer, wait_for_event
from hetis.server.options import ServerOptions
from hetis.server.start_report import report_defaults, report_ready

SAME_SECONDS = 1.0  # within which a second signal means nothing more than the first
ABORT_SECONDS = 2.0  # that aborted requests have to send their last words
FLUSH_SECONDS = 3  # that clients have to read the ends of answers
_POLL_SECONDS = 0.05  # while the server drains
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

Result = TypeVar("Result")
_log = logging.getLogger("hetis")


def serve(options: ServerOptions, engine: dict[str, Any]) -> int:
    """Serves until a signal or the end of the fleet; returns the exit code. `engine`: keyword arguments of `AsyncLLM`.

    0: ended by a signal, all requests finished or aborted in order; 1: the fleet has ended, the log has the reason;
    128 + n: forced by signal n. Raises ValueError for what can be refused before the fleet is up.
    """
    config = make_config(**engine)
    listener = listeners.listen(options)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(ServerLife(listener, options, config).run())
    finally:
        listener.close()
        listeners.remove(options)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, if it is there."""
    if find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


class Starting(msgspec.Struct, frozen=True):
    """What the application sees of an engine until there is one: model files may have to be downloaded first."""

    config: EngineConfig
    is_ready: bool = False
    dead_reason: str | None = None
    status: EngineStatus | None = None
    tokenizer: None = None

    async def ask(self, question: Message, kind: type[Message]) -> Never:
        raise EngineDeadError("the fleet has not been started.")


class ServerLife:
    """From the first request to the last, in one event loop."""

    def __init__(self, listener: socket.socket, options: ServerOptions, config: EngineConfig) -> None:
        self._listener, self._options, self._config = listener, options, config
        # whose names need no file of the model
        plain = msgspec.structs.replace(options, generation_config="vllm", otlp_traces_endpoint=None)
        self._starting = build_app(cast(AsyncLLM, Starting(config)), plain)
        self._http = HttpServer(self._starting, options)
        self._llm: AsyncLLM | None = None  # these two are None until the fleet has been started
        self._server: Server | None = None
        self._ending = asyncio.Event()  # by a signal, or since the fleet has ended
        self._forced = asyncio.Event()
        self._first_signal: float | None = None  # when it came, on the loop's clock
        self._code = 0

    async def run(self) -> int:
        """Serves; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:  # as of a shell's background job
                continue
            loop.add_signal_handler(number, self._on_signal, number)
        tasks = [asyncio.create_task(self._http.serve([self._listener])), asyncio.create_task(self._follow_fleet())]
        for task in tasks:
            task.add_done_callback(lambda _: self._ending.set())
        try:
            await self._ending.wait()
            if self._server is not None:
                await self._drain(self._server)
            tasks[1].cancel()
            self._http.stop(0 if self._forced.is_set() else FLUSH_SECONDS)
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
            return self._code
        finally:
            if self._llm is not None:
                await asyncio.to_thread(self._llm.close)
            if self._server is not None:
                await asyncio.to_thread(self._server.tracing.close)

    def _on_signal(self, number: signal.Signals) -> None:
        now = asyncio.get_running_loop().time()
        if self._first_signal is None:
            self._first_signal = now
            self._on_end_request(f"{number.name}: the server ends.")
        elif now - self._first_signal >= SAME_SECONDS and not self._forced.is_set():
            _log.warning("%s again: ending without waiting for requests.", number.name)
            self._code = self._code or 128 + number
            self._forced.set()

    def _on_end_request(self, reason: str) -> None:
        """By a signal, or as torchrun requests it of other processes, perhaps before it sends the signal."""
        if self._ending.is_set():
            return
        count = 0 if self._server is None else self._server.admission.num_sequences
        seconds = self._options.shutdown_timeout
        _log.info("%s Running sequences: %d, with %g s to finish.", reason, count, seconds)
        self._ending.set()

    # --- the fleet ----------------------------------------------------------------------------------------------------

    async def _follow_fleet(self) -> None:
        """From the start of the fleet to its end."""
        self._llm = llm = await in_lasting_thread(lambda: AsyncLLM.from_config(self._config))
        app = build_app(llm, self._options)
        self._http.app, self._server = app, app.state.server
        llm.on_end_request(self._on_end_request)
        self._starting.state.server.feed.close()  # watchers come again, to the feed of the fleet
        report_defaults(app.state.server)
        try:
            await llm.wait_until_ready()
            report_ready(app.state.server, listeners.url_of(self._listener, self._options))
            await watch(app.state.server)
            reason = llm.dead_reason
        except EngineDeadError as error:
            reason = str(error)
        _log.error("%s", reason)
        self._code = 1

    async def _drain(self, server: Server) -> None:
        """Waits for running requests, and aborts those that the timeout or a second signal leaves unfinished."""
        server.is_draining = True
        server.feed.close()
        is_dead = server.llm.dead_reason is not None
        await self._wait_for_requests(server, ABORT_SECONDS if is_dead else self._options.shutdown_timeout)
        if server.admission.num_sequences and server.llm.dead_reason is None:
            _log.warning("%d unfinished sequences are aborted.", server.admission.num_sequences)
            server.llm.abort_all()
            self._forced.clear()
            await self._wait_for_requests(server, ABORT_SECONDS)

    async def _wait_for_requests(self, server: Server, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while server.admission.num_sequences and not self._forced.is_set():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return
            await wait_for_event(self._forced, min(left, _POLL_SECONDS))


async def watch(server: Server) -> None:
    """Follows the fleet's health, and logs what it does, until it has ended."""
    activity = asyncio.create_task(server.activity.run())
    try:
        await server.health.run()
    finally:
        activity.cancel()


async def in_lasting_thread(function: Callable[[], Result]) -> Result:
    """The result of `function`, called in a thread that lasts as long as this process.

    A child process may end when the thread that started it does (prctl(2), PR_SET_PDEATHSIG).
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Result] = loop.create_future()

    def set_result(result: Result | None, error: BaseException | None) -> None:
        if found.cancelled():
            return
        if error is None:
            found.set_result(result)  # type: ignore[arg-type]
        else:
            found.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        with suppress(RuntimeError):  # the loop has been closed, since the process ends
            loop.call_soon_threadsafe(set_result, result, error)
        threading.Event().wait()

    threading.Thread(target=run, name="starts the fleet", daemon=True).start()
    return await found
