"""`hetis serve` as a process to talk to and to hurt."""

import asyncio
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.launch.fleet_process import FleetProcess
from tests.processes.look import DEADLINE

SMALL = ("--device", "cpu", "--kv-cache-memory", "64MiB", "--dispatch", "even")


class ServerProcess(FleetProcess):
    """A server on a port that was free."""

    def __init__(self, directory: Path, *options: str, **variables: str) -> None:
        super().__init__(
            [sys.executable, "-m", "hetis", "serve", *SMALL, "--port", "0", *options], directory, **variables
        )

    def wait_until_ready(self) -> str:
        """The URL, once the log shows it."""
        found = self.logged(r"ready on (http\S+) ")
        self.members()
        return str(found[1])

    def logged(self, pattern: str) -> "re.Match[str]":
        """The first line of the log that the pattern finds something in, as soon as there is one."""
        find = lambda: next(filter(None, (re.search(pattern, line) for line in [*self.err])), None)  # noqa: E731
        found: re.Match[str] = self.until(find, f"{pattern!r} is logged")
        return found


class Stream:
    """A streamed completion that goes on for `num_tokens` tokens."""

    def __init__(self, client: httpx.AsyncClient, num_tokens: int) -> None:
        self.has_begun = asyncio.Event()
        self.lines: list[str] = []
        self._body = {"prompt": "It was", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        self._task = asyncio.create_task(self._read(client))

    async def _read(self, client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/v1/completions", json=self._body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line:
                    self.lines.append(line)
                    self.has_begun.set()

    async def end(self) -> dict[str, Any]:
        """The last event before [DONE], which must be there."""
        await self._task
        *_, last, done = self.lines
        assert done == "data: [DONE]"
        event: dict[str, Any] = json.loads(last.removeprefix("data: "))
        return event

    @property
    def has_ended(self) -> bool:
        return self._task.done()


async def open_streams(client: httpx.AsyncClient, count: int, num_tokens: int) -> Sequence[Stream]:
    """Streams that have all begun."""
    streams = [Stream(client, num_tokens) for _ in range(count)]
    await asyncio.gather(*(stream.has_begun.wait() for stream in streams))
    return streams


def http_client(url: str, **options: Any) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=DEADLINE, limits=limits, trust_env=False, **options)
