"""Health: `/livez` (the process answers), `/readyz` (requests are welcome), `/health` (the engine advances).

`HealthMonitor` asks the driver for its status about once a second. `/health` shows what it found last, so that a probe
costs nothing and never waits for the driver.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from hetis import __version__
from hetis.core.messages import EngineStatus, StatusQuery
from hetis.frontend.errors import EngineDeadError

if TYPE_CHECKING:
    from hetis.frontend.async_llm import AsyncLLM
    from hetis.server.context import Server

POLL_SECONDS = 1.0
SILENT_SECONDS = 2.0  # for so long a rank has been silent when the driver reports it first

_log = logging.getLogger("hetis")
router = APIRouter(tags=["health"])


# --- progress ---------------------------------------------------------------------------------------------------------


class Progress:
    """Whether the engine advances, from one status per second. Times are in seconds of one monotonic clock.

    Saturation is no fault: the driver answers between two steps, and a step that takes long is one only beyond
    `timeout`.
    """

    def __init__(self, timeout: float, now: float) -> None:
        self._timeout = timeout
        self._answered = self._advanced = now  # when the driver answered last; when a step ended or nothing ran
        self._step = -1
        self._silent: dict[str, float] = {}  # name of a rank: since when

    def update(self, status: EngineStatus, now: float) -> list[str]:
        """Takes a status that came at `now`; returns the sentences about ranks that have become silent since."""
        self._answered = now
        if status.step != self._step or not status.num_running + status.num_waiting:
            self._step, self._advanced = status.step, now
        names = {sentence.partition(" has ")[0]: sentence for sentence in status.silent}
        new = [sentence for name, sentence in names.items() if name not in self._silent]
        self._silent = {name: self._silent.get(name, now - SILENT_SECONDS) for name in names}
        return new

    def problem(self, now: float) -> str | None:
        """Why the engine is unhealthy; None if it is not."""
        if now - self._answered > self._timeout:
            return "the driver does not answer"
        for name, since in self._silent.items():
            if now - since > self._timeout:
                return f"{name} is silent"
        if now - self._advanced > self._timeout:
            return "requests are running, but no step has ended"
        return None


class HealthMonitor:
    """Asks for the status of the engine while it runs."""

    def __init__(self, llm: "AsyncLLM", timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._llm, self._timeout, self._clock = llm, timeout, clock
        self._progress: Progress | None = None  # None until the fleet is up
        self._question: asyncio.Task[EngineStatus] | None = None
        self.problem: str | None = None
        self.status: EngineStatus | None = None  # the latest answer

    async def run(self) -> None:
        """Polls until the fleet has ended."""
        while self._llm.dead_reason is None:
            if self._llm.is_ready:
                await self.poll()
            await asyncio.sleep(POLL_SECONDS)

    async def poll(self) -> None:
        """One question, and what follows from its answer or from its absence."""
        if self._progress is None:
            self._progress = Progress(self._timeout, self._clock())
        if (status := await self._ask()) is not None:
            self.status = status
            for sentence in self._progress.update(status, self._clock()):
                _log.error("%s.", sentence)
        self._report(self._progress.problem(self._clock()))

    async def _ask(self) -> EngineStatus | None:
        """The answer if it comes within `POLL_SECONDS`. Only one question waits at a time: the next call goes on."""
        if self._question is None:
            self._question = asyncio.create_task(self._llm.ask(StatusQuery(), EngineStatus))
        await asyncio.wait([self._question], timeout=POLL_SECONDS)
        if not self._question.done():
            return None
        question, self._question = self._question, None
        with suppress(EngineDeadError):  # `run` ends, and the server with it
            return question.result()
        return None

    def _report(self, problem: str | None) -> None:
        if problem != self.problem:
            if problem is not None:
                _log.error("unhealthy: %s for %g s.", problem, self._timeout)
            else:
                _log.info("healthy again.")
        self.problem = problem


# --- routes -----------------------------------------------------------------------------------------------------------


@router.head("/livez", include_in_schema=False)
@router.get("/livez")
async def livez() -> dict[str, str]:
    """Whether the process answers. Restart it if not."""
    return {"status": "alive"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """Whether new requests are welcome: 503 while the model is loaded, the server ends, or the queue is full."""
    server: Server = request.app.state.server
    state = server.state
    if state == "ready" and not server.admission.has_room():
        return _status(503, "queue full")
    return _status(200 if state == "ready" else 503, state)


@router.head("/health", include_in_schema=False)
@router.get("/health")
@router.get("/ping", include_in_schema=False)
@router.post("/ping", include_in_schema=False)
async def health(request: Request) -> JSONResponse:
    """Whether the engine advances: 503 while the model is loaded, and when steps or answers fail to come."""
    server: Server = request.app.state.server
    state, problem = server.state, server.health.problem
    if state in ("starting", "dead"):
        return _status(503, state)
    return _status(200, "healthy") if problem is None else _status(503, "unhealthy", reason=problem)


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of hetis."""
    return {"version": __version__}


def _status(code: int, status: str, **more: Any) -> JSONResponse:
    return JSONResponse({"status": status, **more}, code, {"Cache-Control": "no-store"})
