"""One request, over and over, at a rate that a server cannot keep up with, by a client that leaves it the processor.

The load generator of `hetis bench serve` keeps every chunk's time, which costs 0.43 ms for a refused request: at 260 of
them a second a ninth of a core, which on two cores would be missing to the server. This one costs a fifth of that.
"""

import asyncio
from collections import Counter
from time import perf_counter
from urllib.parse import urlsplit

TICK_SECONDS = 0.01
_ENDS = {"200": b"\r\n0\r\n\r\n", "503": b"}}"}  # of a stream in chunks, and of an error's JSON


class Storm:
    """What has become of the requests: `ends` counts them by status."""

    def __init__(self, url: str, request: bytes) -> None:
        """`request`: head and body of a streamed completion. The server must answer errors in OpenAI's shape."""
        address = urlsplit(url)
        self._host, self._port, self.request = address.hostname or "", address.port or 80, request
        self.free: list[_Connection] = []
        self.ends: Counter[str] = Counter()

    async def run(self, rate: float, seconds: float) -> None:
        """Sends `rate` requests/s, whatever the server does, and leaves what runs then."""
        begin, sent = perf_counter(), 0
        opened: list[_Connection] = []
        while (now := perf_counter() - begin) < seconds:
            for _ in range(int(now * rate) - sent):
                if not self.free:
                    _, fresh = await asyncio.get_running_loop().create_connection(
                        lambda: _Connection(self), self._host, self._port
                    )
                    opened.append(fresh)
                    self.free.append(fresh)
                self.free.pop().send()
                sent += 1
            await asyncio.sleep(TICK_SECONDS)
        for connection in opened:
            connection.transport.abort()


class _Connection(asyncio.Protocol):
    """A kept connection with one exchange at a time."""

    transport: asyncio.Transport

    def __init__(self, storm: Storm) -> None:
        self._storm, self._status = storm, ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self) -> None:
        self._status = ""
        self.transport.write(self._storm.request)

    def data_received(self, data: bytes) -> None:
        if not self._status:
            self._status = data[9:12].decode()  # after "HTTP/1.1 "
        if data.endswith(_ENDS[self._status]):
            self._storm.ends[self._status] += 1
            self._storm.free.append(self)
