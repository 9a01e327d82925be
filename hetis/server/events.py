"""Server-sent events, and the end of a request whose client has gone."""

import asyncio
from collections.abc import Coroutine

from starlette.types import Receive

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
)
DONE = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    """One event. `data`: JSON, which has no line breaks."""
    return b"data: " + data + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Runs `work`, and cancels it as soon as the client has gone, whatever it waits for.

    `receive`: of the ASGI connection, after the body was read.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
    if not task.cancelled():
        task.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
