"""The one path of a request that generates: admit, tokenise, run, count, answer.

The status is decided before the first byte: a stream begins when its first piece is there, or the refusal. A client
that goes away, while its request is queued or runs, ends it at once, since `until_disconnect` cancels all of this, and
closing the streams of the front end aborts their sequences.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hetis.core.outputs import MODEL_FAILED
from hetis.core.sampling_params import SamplingParams
from hetis.frontend.errors import EngineDeadError
from hetis.frontend.requests import Piece, Request
from hetis.server.errors import ApiError, error_body, internal_error
from hetis.server.events import DONE, HEADERS, event, until_disconnect
from hetis.server.metrics import RequestMeter
from hetis.server.request_log import where
from hetis.server.tracing import Span

if TYPE_CHECKING:
    from hetis.server.context import Server

# characters or tokens of all prompts together, above which a thread reads them: 2 ms or more of the event loop's time
LONG_PROMPT = 4096
MANY_SEQUENCES = 64

_log = logging.getLogger("hetis")


class Writer(Protocol):
    """Forms of one endpoint's answer."""

    def chunk(self, prompt: int, piece: Piece) -> bytes:
        """Events for a piece of one of the prompts; may be empty."""

    def end(self) -> bytes:
        """Events after the last piece."""

    def response(self) -> bytes:
        """The whole answer as JSON, once all requests are finished."""


class Task:
    """What an endpoint asks of the engine.

    - size: of its prompts, in characters and token ids.
    - make_requests: reads and tokenises the prompts; ApiError 400 if one is wrong. May run in a thread.
    - make_writer: of the answer to these requests.
    """

    def __init__(
        self,
        endpoint: str,
        params: SamplingParams,
        *,
        is_stream: bool,
        num_prompts: int,
        size: int,
        make_requests: Callable[[], list[Request]],
        make_writer: Callable[[list[Request]], Writer],
    ) -> None:
        self.endpoint, self.params, self.is_stream = endpoint, params, is_stream
        self.num_sequences, self.size = num_prompts * params.n, size
        self.make_requests, self.make_writer = make_requests, make_writer

    async def requests(self) -> list[Request]:
        if self.size > LONG_PROMPT or self.num_sequences > MANY_SEQUENCES:
            return await asyncio.to_thread(self.make_requests)
        return self.make_requests()


class GenerationResponse(Response):
    """The answer to a task, which runs while it is sent."""

    def __init__(self, server: "Server", http: HttpRequest, task: Task) -> None:
        super().__init__()
        self._server, self._http, self._task = server, http, task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        with self._server.admission.admit(self._task.num_sequences):
            requests = await self._task.requests()
            books = Books(self._server, self._http, self._task, requests)
            try:
                streams = [self._server.llm.stream(request) for request in requests]
                async with aclosing(merged(streams)) as pieces, aclosing(books.counted(pieces)) as counted:
                    await self._answer(send, counted, self._task.make_writer(requests))
            finally:
                books.close()

    async def _answer(self, send: Send, pieces: AsyncGenerator[tuple[int, Piece], None], writer: Writer) -> None:
        try:
            first = await anext(pieces)
            if not self._task.is_stream:
                async for _ in pieces:
                    pass
        except EngineDeadError:
            raise engine_dead() from None
        if self._task.is_stream:
            await self._stream(send, writer, first, pieces)
        else:
            entry = self._http.state.access
            is_long = entry.prompt_tokens + entry.output_tokens > LONG_PROMPT  # with log-probabilities 5 us per token
            await _send_json(send, await asyncio.to_thread(writer.response) if is_long else writer.response())

    async def _stream(
        self, send: Send, writer: Writer, first: tuple[int, Piece], pieces: AsyncGenerator[tuple[int, Piece], None]
    ) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            await _send_part(send, writer.chunk(*first))
            async for prompt, piece in pieces:
                await _send_part(send, writer.chunk(prompt, piece))
            end = writer.end()
        except ApiError as error:
            end = event(error_body(error))
        except EngineDeadError:
            end = event(error_body(engine_dead()))
        except Exception as error:
            _log.error("a stream of %s failed:\n%s", self._task.endpoint, where(error))
            end = event(error_body(internal_error()))
        await send({"type": "http.response.body", "body": end + DONE, "more_body": False})


class Books:
    """What is counted of the requests of a task: metrics and traces of each, and the log line of all."""

    def __init__(self, server: "Server", http: HttpRequest, task: Task, requests: Sequence[Request]) -> None:
        self._entry = http.state.access
        self._entry.prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._meters: list[RequestMeter] = [server.metrics.begin(request, task.endpoint) for request in requests]
        self._spans: list[Span] = [
            server.tracing.begin(http.headers, task.endpoint, request, task.params) for request in requests
        ]
        self._requests = requests
        self._reasons = ["abort"] * len(requests)  # of their latest completions
        self._otherwise = "abort"  # of requests that are not finished

    async def counted(self, pieces: AsyncGenerator[tuple[int, Piece], None]) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces, counted. Raises ApiError for one that ended by an error."""
        meters, entry = self._meters, self._entry
        try:
            async for prompt, piece in pieces:
                meters[prompt].on_piece(piece)
                entry.output_tokens += len(piece.token_ids)
                if piece.finish_reason is not None:
                    self._reasons[prompt] = piece.finish_reason
                    if piece.finish_reason == "error":
                        raise _failure(piece)
                yield prompt, piece
        except Exception:
            self._otherwise = "error"
            raise

    def close(self) -> None:
        for request, reason, meter, span in zip(self._requests, self._reasons, self._meters, self._spans, strict=True):
            self._entry.reason = end = reason if request.finished else self._otherwise
            meter.finish(end)
            span.finish(meter)


async def merged(streams: list[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of all streams as they come, with the number of their stream. Closing it closes all of them."""
    if len(streams) == 1:
        with no_panics():
            async with aclosing(streams[0]) as stream:
                async for piece in stream:
                    yield 0, piece
        return
    arrivals: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(arrivals, *numbered)) for numbered in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            number, found = await arrivals.get()
            if found is None:
                running -= 1
            elif isinstance(found, Exception):
                raise found
            else:
                yield number, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    arrivals: "asyncio.Queue[tuple[int, Piece | Exception | None]]", number: int, stream: AsyncGenerator[Piece, None]
) -> None:
    try:
        with no_panics():
            async with aclosing(stream):
                async for piece in stream:
                    arrivals.put_nowait((number, piece))
        arrivals.put_nowait((number, None))
    except Exception as error:
        arrivals.put_nowait((number, error))


@contextmanager
def no_panics() -> Iterator[None]:
    """Turns panics of tokenizers' Rust code, which are no Exception, into RuntimeError."""
    try:
        yield
    except (Exception, asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"the tokenizer failed ({type(error).__name__}).") from error


def engine_dead() -> ApiError:
    return ApiError(503, "the engine has ended; its log says why.", code="engine_dead")


def _failure(piece: Piece) -> ApiError:
    """500 for a model that fails; what else the engine may say is a fault of the request, as that it can never run."""
    assert piece.error is not None
    status = 500 if piece.error == MODEL_FAILED else 400
    return ApiError(status, f"the request failed: {piece.error.rstrip('.')}.", code="generation_failed")


async def _send_part(send: Send, part: bytes) -> None:
    if part:
        await send({"type": "http.response.body", "body": part, "more_body": True})


async def _send_json(send: Send, body: bytes) -> None:
    headers = ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
