"""`GET /fleet/events`: what the fleet does, once a second, as server-sent events.

One task asks the driver and makes the messages of all watchers, so that the cost does not grow with their number; with
the last watcher it ends.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import StreamingResponse

from hetis.server.errors import ApiError
from hetis.server.feed_message import FeedMessage, MessageMaker, shown
from hetis.server.metrics import Metrics
from hetis.server.sampler import FleetSampler

PERIOD_SECONDS = 1.0
MAX_WATCHERS = 16
MAX_BEHIND = 4  # messages that wait for a slow watcher, before the oldest is dropped
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # the second: nginx passes every event on at once


class Feed:
    """The messages of one server, for all who watch."""

    def __init__(self, sampler: FleetSampler, metrics: Metrics, model: str, state: Callable[[], str]) -> None:
        """`state`: "starting", "ready", "draining" or "dead"."""
        self._sampler, self._state = sampler, state
        self._maker = MessageMaker(sampler, metrics, model)
        self._watchers: set[asyncio.Queue[bytes | None]] = set()
        self._task: asyncio.Task[None] | None = None  # while there are watchers
        self._last: FeedMessage | None = None  # of `_task`
        self._is_closed = False

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def watch(self) -> AsyncGenerator[bytes, None]:
        """Events for one watcher, until the server drains. Raises ApiError 503 for one watcher too many."""
        if self._is_closed or self.num_watchers >= MAX_WATCHERS:
            reason = "the server ends" if self._is_closed else f"{MAX_WATCHERS} clients watch the fleet already"
            raise ApiError(503, f"{reason}; try again later.", headers={"Retry-After": "10"})
        return self._events()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """Joins when it is begun: a client that has gone before that never ends it."""
        queue = self._join()
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._leave(queue)

    def _join(self) -> "asyncio.Queue[bytes | None]":
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_BEHIND)
        self._watchers.add(queue)
        if self._is_closed:
            queue.put_nowait(None)
        elif self._task is None:
            self._task = asyncio.create_task(self._run())
        elif self._last is not None:  # a later watcher need not wait for the next message
            queue.put_nowait(_encode(msgspec.structs.replace(self._last, events=shown(self._sampler.events))))
        return queue

    def _leave(self, queue: "asyncio.Queue[bytes | None]") -> None:
        self._watchers.discard(queue)
        if not self._watchers and self._task is not None:
            self._task.cancel()
            self._task = self._last = None

    def close(self) -> None:
        """Ends all streams after one more message, which has the server's last state."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            self._send(_encode(self._maker.make(self._state(), ())))
            self._send(None)

    # --- the task -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        self._maker.restart()
        due, last_event = loop.time(), 0
        while True:
            await self._sampler.refresh(max_age=PERIOD_SECONDS / 2)
            events = self._sampler.events_after(last_event)
            last_event = max([last_event, *(event.number for event in events)])
            self._last = self._maker.make(self._state(), events)
            self._send(_encode(self._last))
            due = max(due + PERIOD_SECONDS, loop.time())
            await asyncio.sleep(due - loop.time())

    def _send(self, event: bytes | None) -> None:
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)


def _encode(message: FeedMessage) -> bytes:
    return b"data: " + msgspec.json.encode(message) + b"\n\n"


router = APIRouter()


@router.get(
    "/fleet/events",
    response_class=StreamingResponse,
    responses={200: {"description": "One event a second", "content": {"text/event-stream": {}}}},
)
async def show_events(request: Request) -> StreamingResponse:
    """What the fleet does, once a second, as server-sent events."""
    return StreamingResponse(request.app.state.server.feed.watch(), media_type="text/event-stream", headers=HEADERS)
