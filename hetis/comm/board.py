"""Values by key that ranks publish for each other at any time: addresses, process ids, descriptors, tokens.

The driver keeps the board; a rank's end is a `Rendezvous`.
"""

import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from hetis.comm.control import ControlClient
from hetis.core import messages as m

DEFAULT_TIMEOUT = 300.0  # seconds


class Board:
    """All values, and which ranks wait for one that no rank has published yet."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._waiting: dict[str, list[bytes]] = {}

    def answer(self, rank: bytes, message: m.Publish | m.LookUp) -> Iterator[tuple[bytes, m.Published]]:
        """(rank, answer) that are to be sent after this message of `rank`, which is named by its identity."""
        if isinstance(message, m.Publish):
            self._values[message.key] = message.value
            waiting = self._waiting.pop(message.key, [])
        else:
            waiting = [rank]
        if message.key in self._values:
            yield from ((each, m.Published(key=message.key, value=self._values[message.key])) for each in waiting)
        else:
            self._waiting.setdefault(message.key, []).extend(waiting)


class BoardRendezvous:
    """Rendezvous at the driver's board. For one thread."""

    def __init__(self, endpoint: str, rank: int, open_store: Callable[[], Any]) -> None:
        """`open_store`: the store of torch.distributed for process groups, opened when one is made."""
        self._client = ControlClient(endpoint, str(rank), "board")
        self._known: dict[str, bytes] = {}
        self._open_store = open_store

    @cached_property
    def store(self) -> Any:
        return self._open_store()

    def set(self, key: str, value: bytes) -> None:
        self._client.send(m.Publish(key=key, value=value))

    def get(self, key: str, timeout: float | None = None) -> bytes:
        limit = DEFAULT_TIMEOUT if timeout is None else timeout
        deadline = time.monotonic() + limit
        if key not in self._known:
            self._client.send(m.LookUp(key=key))
        while key not in self._known:
            published = self._client.receive(max(0.0, deadline - time.monotonic()))
            if published is None:
                raise TimeoutError(f"no rank set {key!r} at the rendezvous within {limit:g} s.")
            self._known[published.key] = published.value
        return self._known[key]

    def close(self) -> None:
        self._client.close(linger=0)
