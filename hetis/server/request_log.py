"""One log line per request, with its id, route, status, tokens and time; never its text."""

import logging
import re
import time
import traceback
from typing import Any
from uuid import uuid4

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hetis.server.auth import OPEN_PATHS
from hetis.server.errors import error_response, internal_error
from hetis.server.paths import header_of, route_path

LONGEST_ID = 128  # characters of a client's request id that are kept
LONGEST_ADDRESS = 64  # of a client's address
CLIENT_CLOSED = 499  # nginx's status for a client that went away before there was a status
_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._:-]")
_NOT_IN_ADDRESSES = re.compile(r"[^A-Za-z0-9._:%-]")  # %: before the interface of an IPv6 address
_LONGEST_PATH = 100

_log = logging.getLogger("hetis.access")
_errors = logging.getLogger("hetis")


class AccessEntry(msgspec.Struct, kw_only=True):
    """What the log line of one request says. Handlers find it as `request.state.access` and fill in the tokens."""

    request_id: str
    method: str
    route: str  # with placeholders; of a route that does not exist the path as it came, cut
    client: str
    status: int = CLIENT_CLOSED
    seconds: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    reason: str | None = None  # why the output ended: stop, length, abort, error; or "disconnected"

    def text(self) -> str:
        parts = [f"{self.method} {self.route} {self.status} in {self.seconds:.3f} s"]
        if self.prompt_tokens or self.output_tokens:
            parts.append(f"{self.prompt_tokens} + {self.output_tokens} tokens")
        parts += [self.reason] if self.reason else []
        return ", ".join([*parts, f"id {self.request_id}, from {self.client}"])


class RequestLog:
    """The outermost ASGI middleware: gives each request an id, which the answer repeats, and logs its end.

    An exception that no other part handles becomes an answer 500; the log has its type and place. Its message is left
    out: messages of libraries quote what they were given, such as a prompt.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry, begin = _new_entry(scope), time.monotonic()
        scope.setdefault("state", {})["access"] = entry
        answer = _Answer(send, entry)
        try:
            await self._app(scope, receive, answer.send)
        except Exception as error:
            _errors.error("request %s failed:\n%s", entry.request_id, where(error))
            await answer.fail(scope, receive)
        finally:
            entry.seconds = time.monotonic() - begin
            if not answer.is_complete:
                entry.reason = "disconnected"
            route = scope.get("route")
            entry.route = getattr(route, "path", entry.route)
            level = logging.DEBUG if route_path(scope) in OPEN_PATHS else logging.INFO  # probes come every second
            _log.log(level, entry.text(), extra={"fields": msgspec.structs.asdict(entry)})


class _Answer:
    """The answer as far as it has been sent."""

    def __init__(self, send: Send, entry: AccessEntry) -> None:
        self._send, self._entry = send, entry
        self._header = (b"x-request-id", entry.request_id.encode())
        self._has_begun = self.is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun, self._entry.status = True, message["status"]
            message["headers"] = [*message.get("headers", ()), self._header]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True
        await self._send(message)

    async def fail(self, scope: Scope, receive: Receive) -> None:
        """An answer 500, unless another one has begun: that one stays incomplete."""
        if not self._has_begun:
            await error_response(internal_error())(scope, receive, self.send)


def request_id_of(scope: Scope) -> str:
    """The client's `X-Request-Id` without characters that a log or header could misread, cut; else a new id."""
    return _NOT_IN_IDS.sub("", header_of(scope, b"x-request-id") or "")[:LONGEST_ID] or uuid4().hex


def where(error: BaseException) -> str:
    """Type and stack of an exception, without messages."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{frames}{type(error).__name__}"


def _new_entry(scope: Scope) -> AccessEntry:
    path = (scope.get("raw_path") or b"?")[:_LONGEST_PATH].decode("ascii", "backslashreplace")
    return AccessEntry(
        request_id=request_id_of(scope),
        method=scope["method"],
        route=path,
        client=address_of(scope),
    )


def address_of(scope: Scope) -> str:
    """The client's address: of its connection, or as a proxy on this machine states it (X-Forwarded-For).

    Any process of this machine may send that header, so it is cleaned and cut.
    """
    client: Any = scope.get("client")
    if not client:
        return "a unix socket"
    return _NOT_IN_ADDRESSES.sub("", client[0])[:LONGEST_ADDRESS] or "an unknown address"
