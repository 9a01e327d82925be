"""The response to one measured request: chunks of a stream, their stamps, and what they say."""

from typing import Any

import msgspec

from hetis.bench_serve.errors import DISCONNECT, EMPTY, IN_STREAM, MALFORMED, RequestError
from hetis.bench_serve.sse import EventParser

LONGEST_MESSAGE = 300  # characters of an error message that are kept


class Delta(msgspec.Struct):
    """New content of a chat message."""

    content: str | None = None


class Choice(msgspec.Struct):
    """A choice of a chunk: `text` of completions, `delta` of chats."""

    text: str | None = None
    delta: Delta | None = None


class Usage(msgspec.Struct):
    """Numbers of tokens."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Chunk(msgspec.Struct):
    """An event of a stream of completions or chat completions."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(Chunk)


class Answer:
    """Receives the response to one request, and measures it by vLLM's definitions.

    A chunk counts if it has choices, even with empty text; one without choices carries usage only. All times are
    seconds of time.perf_counter. `due`: when the request should have been sent; `start`: when it was.
    """

    __slots__ = (
        *("due", "failure", "first", "first_is_empty", "intervals", "last", "num_tokens", "output_tokens"),
        *("prompt_len", "start", "status", "texts", "_events", "_is_done", "_rest"),
    )

    def __init__(self, prompt_len: int, due: float) -> None:
        self.prompt_len, self.due, self.start = prompt_len, due, due
        self.status = 0
        self.first = self.last = 0.0  # stamps of the first and the latest chunk
        self.first_is_empty = False
        self.intervals: list[float] = []  # between consecutive chunks
        self.texts: list[str] = []  # one per chunk
        self.num_tokens: int | None = None  # from usage
        self.output_tokens = 0  # from usage, else the number of chunks; 0 if failed
        self.failure: RequestError | None = None
        self._events, self._is_done, self._rest = EventParser(), False, b""

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first chunk; 0 if there was none."""
        return self.first - self.start if self.texts else 0.0

    @property
    def latency(self) -> float:
        """Seconds from sending to the last chunk; 0 if there was none."""
        return self.last - self.start if self.texts else 0.0

    @property
    def queue_time(self) -> float:
        """Seconds from when the request was due to when it was sent: concurrency limit, and lag of this client."""
        return self.start - self.due

    def on_body(self, data: bytes, stamp: float) -> None:
        """Takes a part of the body, read at `stamp`."""
        if self.status != 200:
            self._rest = (self._rest + data)[: 1 << 16]
            return
        for event in self._events.feed(data):
            self._on_event(event, stamp)

    def _on_event(self, event: bytes, stamp: float) -> None:
        if event == b"[DONE]":
            self._is_done = True
            return
        try:
            chunk = _decoder.decode(event)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.fail(RequestError(MALFORMED, f"event {_excerpt(event)!r} is not a chunk ({error})"))
            return
        if chunk.error is not None:
            self.fail(RequestError(IN_STREAM, _message(chunk.error)))
        if chunk.usage is not None:
            self.num_tokens = chunk.usage.completion_tokens
            self.prompt_len = chunk.usage.prompt_tokens or self.prompt_len
        if chunk.choices:
            self._on_choice(chunk.choices[0], stamp)

    def _on_choice(self, choice: Choice, stamp: float) -> None:
        text = choice.text if choice.delta is None else choice.delta.content
        if self.texts:
            self.intervals.append(stamp - self.last)
        else:
            self.first, self.first_is_empty = stamp, not text
        self.last = stamp
        self.texts.append(text or "")

    def count_from(self, start: float) -> None:
        """Makes all times count from `start`."""
        self.due -= start
        self.start -= start
        self.first -= start
        self.last -= start

    def fail(self, error: RequestError) -> None:
        """Notes the first failure."""
        if self.failure is None:
            self.failure = error

    def finish(self, is_whole: bool = True) -> None:
        """Judges the response after its end. Without `is_whole`, only [DONE] tells it from one that was cut short."""
        if self.status not in (0, 200):  # 0: no response, so that it has failed already
            self.fail(RequestError(f"HTTP {self.status}", _body_message(self._rest)))
        elif not (is_whole or self._is_done):
            self.fail(RequestError(DISCONNECT, "the connection ended without [DONE]"))
        elif not self.texts:
            self.fail(RequestError(EMPTY, "the stream ended without a chunk that has choices"))
        if self.failure is None:
            self.output_tokens = self.num_tokens or len(self.texts)


def _excerpt(data: bytes) -> str:
    return data[:LONGEST_MESSAGE].decode(errors="replace")


def _message(error: Any) -> str:
    """The message of an error object of OpenAI's shape, else its text."""
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:LONGEST_MESSAGE]


def _body_message(body: bytes) -> str:
    """The message in the body of a refusal: {"error": {"message"}}, {"message"} or {"detail"}, else its text."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return " ".join(_excerpt(body).split())
    if isinstance(found, dict):
        found = found.get("error") or found.get("detail") or found
    return _message(found)
