"""One client connection: uvicorn's, with limits on what is buffered before the application sees a request.

uvicorn itself waits for ever for a request that never ends, and keeps headers of any size.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from hetis.server.errors import ApiError, error_body
from hetis.server.limits import MAX_HEADER_BYTES, headers_too_large

KEEP_ALIVE_SECONDS = 75  # between two requests; longer than the pools of clients and proxies, which then close first
HEADER_SECONDS = 20.0  # from the first byte of a request, or from the connection, to the end of the headers
BODY_SECONDS = 60.0  # from there to the end of the body
WRITE_SECONDS = 120.0  # that a client may leave a full buffer of its answer unread


class Connection(HttpToolsProtocol):
    """A connection whose requests must come in time. Answers may take as long as they like, while they are read."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_headers = False
        self._num_events = 0  # of the parser
        self._num_pending = 0  # bytes that came since its last event: of headers or trailers that are not complete

    # --- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer(HEADER_SECONDS, self._on_late_headers)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # refused
            return
        before = self._num_events
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._num_pending = self._num_pending + len(data) if self._num_events == before else 0
        if self._num_pending > MAX_HEADER_BYTES:
            self._refuse(headers_too_large())

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "the request is not valid HTTP/1.1."))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # --- the parser's events ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_events += 1
        self._in_headers = True
        self._start_timer(HEADER_SECONDS, self._on_late_headers)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # else it is a trailer, which nothing reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_events += 1
        self._in_headers = False
        self._start_timer(BODY_SECONDS, self._on_late_body)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_events += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_events += 1
        self._stop_timer()
        super().on_message_complete()
        if self.cycle.response_complete:  # the answer did not wait for the body
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _unsupported_upgrade_warning(self) -> None:
        """No warning: clients may ask for HTTP/2 or WebSocket, and get HTTP/1.1."""

    # --- timers -------------------------------------------------------------------------------------------------------

    def _start_timer(self, seconds: float, handler: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, handler)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_late_headers(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # the beginning of a next request came early
            self._start_timer(HEADER_SECONDS, self._on_late_headers)
        elif not self._in_headers:  # nothing has come
            self.transport.close()
        else:
            self._refuse(ApiError(408, f"the headers were not complete after {HEADER_SECONDS:g} s."))

    def _on_late_body(self) -> None:
        if self.pipeline:  # not read yet, since the answer to the request before is being sent
            self._start_timer(BODY_SECONDS, self._on_late_body)
        else:
            self._refuse(ApiError(408, f"the body was not complete after {BODY_SECONDS:g} s."))

    def _refuse(self, error: ApiError) -> None:
        """Sends an error, unless an answer has begun, and closes the connection."""
        self._stop_timer()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = error_body(error)
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()
