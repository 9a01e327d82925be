"""What a connection does before the application sees a request: clients that are slow, send too much, or no HTTP."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from hetis.server import connection
from hetis.server.http_server import HttpServer
from hetis.server.limits import MAX_HEADER_BYTES
from hetis.server.options import ServerOptions
from tests.processes.look import DEADLINE
from tests.server.quiet_engine import frame

LIMIT = 100_000  # bytes of a body
POST = b"POST /v1/x HTTP/1.1\r\nhost: x\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Script = Callable[[Callable[[], Awaitable[Streams]]], Awaitable[None]]


def run(directory: Path, script: Script, app: Any = None) -> None:
    """Runs a script of a client against a server on a unix socket. It gets a function that connects."""
    path = str(directory / "s")

    async def all_of_it() -> None:
        async with serving(path, app or frame(max_body_bytes=LIMIT)[1]):
            await script(lambda: asyncio.open_unix_connection(path))

    asyncio.run(asyncio.wait_for(all_of_it(), DEADLINE))


@asynccontextmanager
async def serving(path: str, app: Any) -> AsyncIterator[None]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.setblocking(False)
    server = HttpServer(app, ServerOptions())
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield
    finally:
        server.stop(0)
        await task


async def answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    """Status and JSON of the next answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:-2])
    body = await reader.readexactly(int(headers["content-length"]))
    return int(head.split()[1]), json.loads(body)


async def refusal(streams: Streams) -> tuple[int, str]:
    """Status and sentence of an answer, after which the server closes the connection."""
    status, found = await answer(streams[0])
    assert await streams[0].read() == b""
    return status, found["error"]["message"]


def flood(path: Path, first: bytes, part: bytes) -> str:
    """What a client reads that sends on and on until the server does not take more."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE)
        client.connect(str(path))
        found = b""
        with suppress(OSError):
            client.sendall(first)
            for _ in range(1000):
                client.sendall(part)
        with suppress(ConnectionResetError):
            while new := client.recv(1 << 16):
                found += new
        return found.decode()


def test_a_connection_serves_several_requests(directory: Path) -> None:
    async def script(connect: Any) -> None:
        reader, writer = await connect()
        for _ in range(3):
            writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await answer(reader) == (200, {"status": "alive"})

    run(directory, script)


@pytest.mark.parametrize("line", [b"GET /livez HTTP/1.1\r\nx: ", b"GET /", b"GET /livez HTTP/1.1\r\n"])
def test_headers_without_an_end_are_refused(line: bytes, directory: Path) -> None:
    async def script(connect: Any) -> None:
        part = b"a: b\r\n" * 2000 if line.endswith(b"\n") else b"y" * 12_000
        text = await asyncio.to_thread(flood, directory / "s", line, part)
        assert text.startswith("HTTP/1.1 431 ")
        assert "the URL and the headers are larger than 64.00 KiB" in text

    run(directory, script)


def test_complete_headers_beyond_the_limit_are_refused(directory: Path) -> None:
    async def script(connect: Any) -> None:
        reader, writer = await connect()
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"y" * MAX_HEADER_BYTES + b"\r\n\r\n")
        assert (await answer(reader))[0] == 431

    run(directory, script)


def test_what_is_no_http_is_refused_in_openais_shape(directory: Path) -> None:
    async def script(connect: Any) -> None:
        for text in (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"hello\r\n\r\n",
            b"GET / HTTP/1.1\r\n: x\r\n\r\n",
        ):
            streams = await connect()
            streams[1].write(text)
            assert await refusal(streams) == (400, "the request is not valid HTTP/1.1.")

    run(directory, script)


def test_a_slow_client_gets_408(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.2)

    async def script(connect: Any) -> None:
        streams = await connect()
        streams[1].write(b"GET /livez HTTP/1.1\r\nhost")
        assert await refusal(streams) == (408, "the headers were not complete after 0.2 s.")
        streams = await connect()
        streams[1].write(POST + b"content-length: 10\r\n\r\n12345")
        assert await refusal(streams) == (408, "the body was not complete after 0.2 s.")
        reader, _ = await connect()
        assert await reader.read() == b"", "closed without an answer to nothing"

    run(directory, script)


def test_a_long_answer_takes_its_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the client has begun another request meanwhile."""
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.01)
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.01)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.sleep(0.3)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": b"1"})

    async def script(connect: Any) -> None:
        reader, writer = await connect()
        writer.write(POST + b"content-length: 0\r\n\r\n" + POST + b"content-length: 4\r\n\r\n12")
        assert await answer(reader) == (200, 1)

    run(directory, script, app)


def test_a_body_that_is_too_large_is_refused_before_it_has_come_and_the_connection_goes_on(directory: Path) -> None:
    async def script(connect: Any) -> None:
        reader, writer = await connect()
        size = 40 * LIMIT
        writer.write(POST + b"content-length: %d\r\n\r\n" % size)
        status, found = await answer(reader)
        assert (status, found["error"]["type"]) == (413, "invalid_request_error")
        for _ in range(40):
            writer.write(b"x" * LIMIT)
            await writer.drain()
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer(reader))[0] == 200

    run(directory, script)


def test_chunks_are_counted_while_they_come(directory: Path) -> None:
    async def script(connect: Any) -> None:
        reader, writer = await connect()
        writer.write(POST + b"transfer-encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n" % 50_000 + b"x" * 50_000 + b"\r\n"
        writer.write(chunk * 3)
        assert (await answer(reader))[0] == 413

    run(directory, script)


def test_trailers_are_limited_and_change_no_header(directory: Path) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": b"1"})

    async def script(connect: Any) -> None:
        reader, writer = await connect()
        head = POST + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
        writer.write(head + b"authorization: Bearer key\r\n\r\n")
        assert await answer(reader) == (200, 1)
        assert b"authorization" not in dict(seen)
        text = await asyncio.to_thread(flood, directory / "s", head + b"trailer: ", b"y" * 12_000)
        assert text.startswith("HTTP/1.1 431 ")

    run(directory, script, app)


def test_a_reader_that_stops_loses_its_connection(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.2)
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            await asyncio.sleep(0)
        assert gone.result()["type"] == "http.disconnect"
        ended.set()

    async def script(connect: Any) -> None:
        _, writer = await connect()
        writer.transport.pause_reading()
        writer.write(POST + b"content-length: 0\r\n\r\n")
        await ended.wait()

    run(directory, script, app)


def test_an_upgrade_is_answered_as_plain_http(directory: Path) -> None:
    async def script(connect: Any) -> None:
        for protocol in (b"h2c", b"websocket"):
            reader, writer = await connect()
            writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: " + protocol + b"\r\n\r\n")
            assert (await answer(reader))[0] == 200

    run(directory, script)
