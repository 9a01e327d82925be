"""HTTP/1.1: responses cut anywhere, kept connections, and every way in which a response ends early."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from hetis.bench_serve.errors import RequestError
from hetis.bench_serve.http_client import Connection, HttpClient, WholeBody

RESPONSES = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nz: 1\r\n\r\n",
    "interim": b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
}
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written, self.is_aborted = b"", False

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted


async def exchanged(parts: list[bytes], *, ends: bool = False) -> tuple[WholeBody, bool | RequestError, Connection]:
    """What a connection makes of a response in `parts`. `ends`: the server closes the connection then."""
    connection, body = Connection(), WholeBody()
    connection.connection_made(Wire())  # type: ignore[arg-type]
    done = connection.exchange(b"GET / HTTP/1.1\r\n\r\n", body)
    for part in parts:
        connection.data_received(part)
    if ends:
        connection.connection_lost(None)
    assert done.done()
    error = done.exception()
    return body, error if isinstance(error, RequestError) else done.result(), connection


@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_may_be_cut_anywhere(name: str) -> None:
    async def check() -> None:
        data = RESPONSES[name]
        for cut in range(1, len(data)):
            body, is_whole, connection = await exchanged([data[:cut], data[cut:]])
            assert (body.status, body.body, is_whole, connection.is_reusable) == (200, b"hello", True, True), cut

    asyncio.run(check())


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "connection closed early"),
        (b"HTTP/1.1 200 OK\r\nconte", "connection closed early"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell", "connection closed early"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", "connection closed early"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "malformed response"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", "malformed response"),
    ],
)
def test_a_response_that_is_cut_short_fails(data: bytes, kind: str) -> None:
    async def check() -> None:
        _, error, connection = await exchanged([data], ends=True)
        assert isinstance(error, RequestError)
        assert error.kind == kind
        assert not connection.is_reusable

    asyncio.run(check())


def test_a_body_without_length_ends_with_its_connection() -> None:
    async def check() -> None:
        body, is_whole, _ = await exchanged([b"HTTP/1.1 200 OK\r\n\r\nhel", b"lo"], ends=True)
        assert (body.body, is_whole) == (b"hello", False)

    asyncio.run(check())


def test_a_connection_that_the_server_will_close_is_not_used_again() -> None:
    async def check() -> None:
        data = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        assert not (await exchanged([data]))[2].is_reusable
        _, _, connection = await exchanged([RESPONSES["length"]])
        connection.data_received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        assert not connection.is_reusable

    asyncio.run(check())


# --- over sockets -----------------------------------------------------------------------------------------------------


def with_server(serve: Serve, use: Callable[[HttpClient], Awaitable[None]]) -> None:
    """Runs `use` with a client of a server whose connections are served by `serve`."""

    async def run() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/prefix/v1")
            await use(client)
            client.close()

    asyncio.run(run())


def test_requests_share_connections_and_carry_their_headers() -> None:
    heads: list[list[bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append([])
        try:
            while True:
                heads[-1].append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(RESPONSES["length"])
        except asyncio.IncompleteReadError:
            writer.close()

    async def use(client: HttpClient) -> None:
        request = client.encode("GET", "/v1/models", headers={"X-Name": "ü"})
        for _ in range(3):
            await client.exchange(request, WholeBody(), 5)
        await asyncio.gather(*(client.exchange(request, WholeBody(), 5) for _ in range(2)))

    with_server(serve, use)
    assert sorted(map(len, heads)) == [1, 4]
    assert heads[0][0].startswith(b"GET /prefix/v1/models HTTP/1.1\r\nhost: 127.0.0.1:")
    assert "x-name: ü\r\n".encode() in heads[0][0]


def test_a_request_that_takes_too_long_fails_and_ends_its_connection() -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()
        ended.set()
        writer.close()

    async def use(client: HttpClient) -> None:
        with pytest.raises(RequestError, match=r"timed out: no complete response within 0\.05 s"):
            await client.exchange(client.encode("GET", "/"), WholeBody(), 0.05)
        await asyncio.wait_for(ended.wait(), 10)

    with_server(serve, use)


def test_a_server_that_is_not_there_is_named() -> None:
    client = HttpClient("http://127.0.0.1:1")
    with pytest.raises(RequestError, match=r"connection failed: 127.0.0.1 port 1: "):
        asyncio.run(client.json("GET", "/"))


@pytest.mark.parametrize("address", ["ftp://x", "http://", "http://x:99999", "http://x:y", "http://x/?q"])
def test_addresses_that_cannot_be_used_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"--base-url .* is not an address"):
        HttpClient(address)


@pytest.mark.parametrize("name", ["a\r\nb", "a:b", "", "ü"])
def test_headers_that_would_break_the_request_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        HttpClient("localhost:80").encode("GET", "/", headers={name: "x"})
    with pytest.raises(ValueError, match="cannot be sent"):
        HttpClient("localhost:80", {"x": "1\n2"}).encode("GET", "/")
