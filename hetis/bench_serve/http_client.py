"""HTTP/1.1 on asyncio's transports, with the parser that uvicorn uses (httptools, C).

A chunk is stamped in the transport's callback, before anything is parsed. The streams of a general client (httpx) cost
15 times as much of a core (`bench/bench_client.py --cost`), so that at 200 streams/s it measures its own queue.
"""

import asyncio
import json
import ssl
import time
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools

from hetis.bench_serve.errors import CONNECT, DISCONNECT, MALFORMED, TIMEOUT, RequestError

# seconds for which an idle connection is used again: below the keep-alive of servers (uvicorn 5 s), so that none is
# closed by its server while a request is on its way
IDLE_SECONDS = 2.0
LARGEST_BODY = 16 << 20  # bytes of a response that is read as a whole
PROBE_SECONDS = 60.0  # for requests that are not measured


class Receiver(Protocol):
    """What takes a response as it comes."""

    status: int

    def on_body(self, data: bytes, stamp: float) -> None:
        """Takes a part of the body, read at `stamp` (time.perf_counter)."""


class WholeBody:
    """A receiver that keeps the body."""

    def __init__(self) -> None:
        self.status, self.body = 0, b""

    def on_body(self, data: bytes, stamp: float) -> None:
        """Appends `data`."""
        if len(self.body) + len(data) <= LARGEST_BODY:
            self.body += data


class Connection(asyncio.Protocol):
    """A connection with at most one exchange at a time. Methods on_* without documentation are httptools's."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._transport: Any = None
        self._parser: Any = None
        self._receiver: Receiver = WholeBody()
        self._done: asyncio.Future[bool] | None = None
        self._has_length = self._has_headers = self._is_kept = False
        self._stamp, self._num_bytes = 0.0, 0

    def exchange(self, request: bytes, receiver: Receiver) -> "asyncio.Future[bool]":
        """Sends `request`. The future ends with the response: False if only the end of the connection ended it.

        Its exception is a RequestError.
        """
        self._parser = httptools.HttpResponseParser(self)
        self._receiver, self._num_bytes = receiver, 0
        self._has_length = self._has_headers = self._is_kept = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    @property
    def is_reusable(self) -> bool:
        """Whether another request can follow on this connection."""
        return self._is_kept and not self._transport.is_closing()

    def close(self) -> None:
        """Closes the connection, also in the middle of an exchange."""
        self._transport.abort()

    # --- callbacks of the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Stamps and parses what was read."""
        self._stamp = time.perf_counter()
        if self._done is None or self._done.done():
            self._transport.abort()  # bytes that no request asked for
            return
        self._num_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(MALFORMED, f"the response is not HTTP/1.1 ({error})")

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the exchange: a response without a length ends with its connection."""
        if self._done is None or self._done.done():
            return
        if self._has_headers and not self._has_length and exc is None:
            self._done.set_result(False)
        else:
            reason = "" if exc is None else f" ({exc})"
            self._fail(DISCONNECT, f"the server closed the connection after {self._num_bytes} bytes{reason}")

    def _fail(self, kind: str, message: str) -> None:
        assert self._done is not None
        self._done.set_exception(RequestError(kind, message))
        self._transport.abort()

    # --- callbacks of httptools ---

    def on_header(self, name: bytes, value: bytes) -> None:
        self._has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._receiver.status = self._parser.get_status_code()
        self._has_headers = True

    def on_body(self, body: bytes) -> None:
        self._receiver.on_body(body, self._stamp)

    def on_message_complete(self) -> None:
        assert self._done is not None
        if self._receiver.status >= 200 and not self._done.done():  # below: an interim response, such as 100 Continue
            self._is_kept = self._parser.should_keep_alive()
            self._done.set_result(True)


class HttpClient:
    """Requests to one server over a pool of kept connections."""

    def __init__(self, base_url: str, headers: dict[str, str] | None = None, *, verify: bool = True) -> None:
        """Raises ValueError for an address that cannot be used. `verify`: check the server's certificate."""
        url = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        try:
            port = url.port
        except ValueError:
            port = -1
        if url.scheme not in ("http", "https") or not url.hostname or port == -1 or url.query or url.fragment:
            raise ValueError(f"--base-url {base_url!r} is not an address; write for example http://127.0.0.1:8000.")
        self._tls = None
        if url.scheme == "https":
            self._tls = ssl.create_default_context()
            if not verify:
                self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        self._host, self._port = url.hostname, port or (443 if self._tls else 80)
        # clients of OpenAI's interface are given addresses with /v1, vLLM's benchmark without
        self._prefix = url.path.rstrip("/").removesuffix("/v1")
        self._headers = {"host": url.netloc.rpartition("@")[2], "user-agent": "hetis-bench", **(headers or {})}
        self._addresses: list[str] = []
        self._idle: list[Connection] = []

    def encode(self, method: str, path: str, payload: Any = None, headers: dict[str, str] | None = None) -> bytes:
        """The bytes of a request with `payload` as JSON. Raises ValueError for headers that HTTP cannot carry."""
        body = b"" if payload is None else json.dumps(payload, separators=(",", ":")).encode()
        fields = {**self._headers, "content-length": str(len(body)), "content-type": "application/json"}
        fields |= {name.lower(): value for name, value in (headers or {}).items()}
        for name, value in fields.items():
            if not name.isascii() or any(c in name + value for c in "\r\n\0") or not name.strip() or ":" in name:
                raise ValueError(f"header {name!r} cannot be sent; write KEY=VALUE on one line.")
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def exchange(self, request: bytes, receiver: Receiver, timeout: float) -> bool:
        """Sends `request` and hands the response to `receiver`. Raises RequestError, also after `timeout` seconds.

        False: the response had no length and ended with its connection, so that it may have been cut short.
        """
        connection = None
        try:
            async with asyncio.timeout(timeout):
                connection = self._take_idle() or await self._connect()
                return await connection.exchange(request, receiver)
        except TimeoutError:
            raise RequestError(TIMEOUT, f"no complete response within {timeout:g} s") from None
        finally:
            if connection is not None:
                self._put_back(connection)

    async def json(self, method: str, path: str, payload: Any = None) -> tuple[int, Any]:
        """Status and decoded body of a request that is not measured; None for a body that is not JSON."""
        receiver = WholeBody()
        await self.exchange(self.encode(method, path, payload), receiver, PROBE_SECONDS)
        try:
            return receiver.status, json.loads(receiver.body)
        except ValueError:
            return receiver.status, None

    def close(self) -> None:
        """Closes the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _take_idle(self) -> Connection | None:
        now = time.perf_counter()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable and now - connection.idle_since < IDLE_SECONDS:
                return connection
            connection.close()
        return None

    def _put_back(self, connection: Connection) -> None:
        if connection.is_reusable:
            connection.idle_since = time.perf_counter()
            self._idle.append(connection)
        else:
            connection.close()

    async def _connect(self) -> Connection:
        """A new connection. Remembers which address of the host answered: a lookup takes a thread each time."""
        loop = asyncio.get_running_loop()
        try:
            if not self._addresses:
                found = await loop.getaddrinfo(self._host, self._port, type=1)
                self._addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
            name = self._host if self._tls else None
            for address in self._addresses:
                try:
                    _, connection = await loop.create_connection(
                        Connection, address, self._port, ssl=self._tls, server_hostname=name
                    )
                except ConnectionRefusedError:
                    if address == self._addresses[-1]:
                        raise
                    continue
                self._addresses = [address]
                return connection
        except OSError as error:  # ssl.SSLError is one as well
            raise RequestError(CONNECT, f"{self._host} port {self._port}: {error.strerror or error}") from None
        raise AssertionError("a host name has no address")
