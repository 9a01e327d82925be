"""The life of the server in one process, with a stand-in for the fleet: start, drain, force, and the fleet's end."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from hetis.core.config import EngineConfig
from hetis.core.messages import EngineStatus
from hetis.frontend.errors import EngineDeadError, FleetRefusedError
from hetis.server import activity_log, health, serving
from hetis.server.app import build_app
from hetis.server.listener import listen
from hetis.server.options import ServerOptions
from hetis.server.serving import ServerLife
from tests.processes.look import DEADLINE
from tests.server.quiet_engine import QuietEngine

Script = Callable[[httpx.AsyncClient, "Fleet"], Awaitable[None]]


class Fleet(QuietEngine):
    """- may_start: `from_config` waits for it; refusal: what it raises then.
    - may_finish: streams end; failure: what `wait_until_ready` raises.
    - act: what a launcher's request to end calls."""

    def __init__(self) -> None:
        super().__init__()
        self.is_ready = False
        self.may_start, self.may_finish = threading.Event(), asyncio.Event()
        self.may_start.set()
        self.refusal: Exception | None = None
        self.failure: Exception | None = None
        self.answer = self._status
        self.act: Callable[[str], None] | None = None

    def on_end_request(self, act: Callable[[str], None]) -> None:
        self.act = act

    async def _status(self) -> EngineStatus:
        return EngineStatus()

    def from_config(self, config: EngineConfig) -> "Fleet":
        assert self.may_start.wait(DEADLINE)
        if self.refusal is not None:
            raise self.refusal
        return self

    async def wait_until_ready(self) -> None:
        if self.failure is not None:
            raise self.failure
        self.is_ready = True

    def abort_all(self) -> None:
        super().abort_all()
        self.may_finish.set()

    def app(self, llm: Any, options: ServerOptions) -> FastAPI:
        """The application, with a route whose answer ends when it may, or is aborted."""
        app = build_app(llm, options)

        @app.post("/hold")
        async def hold(request: Request) -> StreamingResponse:
            async def parts() -> AsyncIterator[bytes]:
                with request.app.state.server.admission.admit(1):
                    yield b"begin "
                    await self.may_finish.wait()
                    yield b"abort" if self.num_aborts else b"end"

            return StreamingResponse(parts())

        return app


def run(directory: Path, monkeypatch: pytest.MonkeyPatch, script: Script, fleet: Fleet, **options: Any) -> int:
    """The exit code of a server on a unix socket, while `script` runs, and until it has ended, too."""
    chosen = ServerOptions(uds=str(directory / "s"), **options)
    monkeypatch.setattr(serving, "AsyncLLM", fleet)
    monkeypatch.setattr(serving, "build_app", fleet.app)
    monkeypatch.setattr(health, "POLL_SECONDS", 0.01)

    async def both() -> int:
        life = asyncio.create_task(ServerLife(listener, chosen, EngineConfig()).run())
        transport = httpx.AsyncHTTPTransport(uds=chosen.uds)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=DEADLINE) as client:
            await script(client, fleet)
            return await life

    with listen(chosen) as listener:
        return asyncio.run(asyncio.wait_for(both(), DEADLINE))


async def until(client: httpx.AsyncClient, state: str) -> None:
    """Waits until the server is in this state."""
    while (await client.get("/readyz")).json()["status"] != state:
        await asyncio.sleep(0.01)


async def begin(client: httpx.AsyncClient, count: int) -> list["asyncio.Task[str]"]:
    """The texts of so many streams, all of which have begun."""
    begun = asyncio.Barrier(count + 1)

    async def read() -> str:
        text = ""
        async with client.stream("POST", "/hold", content=b"") as answer:
            async for part in answer.aiter_text():
                if not text:
                    await begun.wait()
                text += part
        return text

    tasks = [asyncio.create_task(read()) for _ in range(count)]
    await begun.wait()
    return tasks


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        await until(client, "ready")
        streams = await begin(client, 5)
        send(number)
        await until(client, "draining")
        found = await client.post("/v1/completions", json={})
        assert (found.status_code, found.headers["retry-after"]) == (503, "10")
        assert (await client.get("/livez")).status_code == (await client.get("/health")).status_code == 200
        assert not any(stream.done() for stream in streams)
        fleet.may_finish.set()
        assert await asyncio.gather(*streams) == ["begin end"] * 5

    fleet = Fleet()
    assert run(directory, monkeypatch, script, fleet) == 0
    assert (fleet.is_closed, fleet.num_aborts) == (True, 0)


def test_without_time_to_finish_requests_are_aborted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        await until(client, "ready")
        streams = await begin(client, 3)
        send(signal.SIGTERM)
        assert await asyncio.gather(*streams) == ["begin abort"] * 3

    fleet = Fleet()
    assert run(directory, monkeypatch, script, fleet, shutdown_timeout=0) == 0
    assert fleet.is_closed


def test_a_second_signal_forces(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        await until(client, "ready")
        streams = await begin(client, 3)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        await until(client, "draining")
        assert (await client.get("/health")).status_code == 200
        assert not any(stream.done() for stream in streams), "both were one request"
        monkeypatch.setattr(serving, "SAME_SECONDS", 0.0)
        send(signal.SIGINT)
        assert await asyncio.gather(*streams) == ["begin abort"] * 3

    fleet = Fleet()
    assert run(directory, monkeypatch, script, fleet, shutdown_timeout=1e6) == 128 + signal.SIGINT
    assert fleet.is_closed


def test_a_request_of_a_launcher_drains_and_its_signal_changes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        await until(client, "ready")
        streams = await begin(client, 3)
        assert fleet.act is not None
        fleet.act("rank 1 was asked to end by its launcher.")
        await until(client, "draining")
        send(signal.SIGTERM)
        assert (await client.get("/health")).status_code == 200
        fleet.may_finish.set()
        assert await asyncio.gather(*streams) == ["begin end"] * 3

    assert run(directory, monkeypatch, script, Fleet()) == 0


def test_streams_that_ignore_the_abort_are_cut(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ABORT_SECONDS", 0.1)
    monkeypatch.setattr(serving, "FLUSH_SECONDS", 0)
    monkeypatch.setattr(Fleet, "abort_all", QuietEngine.abort_all)

    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        await until(client, "ready")
        [stream] = await begin(client, 1)
        send(signal.SIGTERM)
        with pytest.raises(httpx.HTTPError):
            await stream

    assert run(directory, monkeypatch, script, Fleet(), shutdown_timeout=0) == 0


def test_the_end_of_the_fleet_ends_the_server(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("hetis").propagate = True

    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        await until(client, "ready")
        fleet.dead_reason = "rank 1 (attention worker on cpu) was killed by SIGKILL."

    fleet = Fleet()
    assert run(directory, monkeypatch, script, fleet) == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [fleet.dead_reason]
    assert (fleet.is_closed, fleet.num_aborts) == (True, 0)


def test_the_log_says_what_the_server_does(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("hetis").propagate = True
    monkeypatch.setattr(activity_log, "PERIOD_SECONDS", 0.01)

    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        fleet.status = EngineStatus(num_running=1)
        while "1 running, 0 waiting; " not in caplog.text:
            await asyncio.sleep(0.01)
        send(signal.SIGTERM)

    with caplog.at_level(logging.INFO, "hetis"):
        assert run(directory, monkeypatch, script, Fleet()) == 0


def test_a_fleet_that_fails_to_start_ends_the_server(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("hetis").propagate = True

    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        return

    for error in (EngineDeadError("rank 0 failed."), FleetRefusedError("the plan does not fit.")):
        fleet = Fleet()
        fleet.failure = error
        assert run(directory, monkeypatch, script, fleet) == 1
        assert str(error) in caplog.text
        assert fleet.is_closed


def test_what_is_refused_at_the_start_is_an_error_of_the_user(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        return

    fleet = Fleet()
    fleet.refusal = ValueError("plan '9+9' needs more memory than there is.")
    with pytest.raises(ValueError, match="needs more memory"):
        run(directory, monkeypatch, script, fleet)


def test_the_server_answers_while_the_fleet_is_being_started(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model files may have to be downloaded for that. A signal then ends the server at once."""
    fleet = Fleet()
    fleet.may_start.clear()

    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        for path, status in (("/livez", 200), ("/readyz", 503), ("/health", 503), ("/version", 200)):
            assert (await client.get(path)).status_code == status
        for method, path in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
            found = await client.request(method, path)
            assert (found.status_code, found.headers["retry-after"]) == (503, "5")
        send(signal.SIGTERM)

    try:
        assert run(directory, monkeypatch, script, fleet) == 0
        assert not fleet.is_closed
    finally:
        fleet.may_start.set()


def test_an_ignored_signal_stays_ignored(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a background job of a shell, which Ctrl-C is not for."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def script(client: httpx.AsyncClient, fleet: Fleet) -> None:
        await until(client, "ready")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        send(signal.SIGTERM)

    try:
        assert run(directory, monkeypatch, script, Fleet()) == 0
    finally:
        signal.signal(signal.SIGINT, before)
