"""Servers that are asked to end, frozen, and killed, while they stream."""

import asyncio
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.launch.fleet_process import FleetProcess
from tests.processes.look import DEADLINE
from tests.server.server_process import SMALL, ServerProcess, http_client, open_streams

pytestmark = pytest.mark.process


def run(script: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(script, DEADLINE))


def ask_to_end(process: FleetProcess) -> None:
    process.members()
    process.process.send_signal(signal.SIGTERM)


async def until_status(client: httpx.AsyncClient, path: str, status: int) -> None:
    while (await client.get(path)).status_code != status:
        await asyncio.sleep(0.1)


def test_a_server_drains_fifty_streams(directory: Path) -> None:
    with ServerProcess(directory, "--shutdown-timeout", "300") as process:
        url = process.wait_until_ready()

        async def script() -> None:
            async with http_client(url) as client:
                streams = await open_streams(client, 50, 400)
                ask_to_end(process)
                await until_status(client, "/readyz", 503)
                found = await client.post("/v1/completions", json={"prompt": "It"})
                assert (found.status_code, found.headers["retry-after"]) == (503, "10")
                for stream in streams:
                    assert (await stream.end())["choices"][0]["finish_reason"] == "length"

        run(script())
        assert process.wait() == 0, process.text()
        assert process.leftovers() == []


def test_without_time_to_finish_streams_are_aborted(directory: Path) -> None:
    with ServerProcess(directory, "--shutdown-timeout", "0") as process:
        url = process.wait_until_ready()

        async def script() -> None:
            async with http_client(url) as client:
                streams = await open_streams(client, 20, 900)
                ask_to_end(process)
                for stream in streams:
                    assert (await stream.end())["choices"][0]["finish_reason"] == "abort"

        run(script())
        assert process.wait() == 0, process.text()
        assert process.leftovers() == []


def test_a_second_signal_forces(directory: Path) -> None:
    with ServerProcess(directory, "--shutdown-timeout", "100000") as process:
        url = process.wait_until_ready()

        async def script() -> None:
            async with http_client(url) as client:
                streams = await open_streams(client, 5, 900)
                ask_to_end(process)
                await until_status(client, "/readyz", 503)
                while not streams[0].has_ended:  # signals of the first second are one
                    ask_to_end(process)
                    await asyncio.sleep(0.1)
                for stream in streams:
                    assert (await stream.end())["choices"][0]["finish_reason"] == "abort"

        run(script())
        assert process.wait() == 128 + signal.SIGTERM, process.text()
        assert process.leftovers() == []


def test_ctrl_c_drains_too(directory: Path) -> None:
    with ServerProcess(directory) as process:
        process.wait_until_ready()
        process.members()
        process.process.send_signal(signal.SIGINT)
        assert process.wait() == 0, process.text()


def test_a_signal_during_the_start_ends_all(directory: Path) -> None:
    with ServerProcess(directory) as process:
        process.member("driver")
        ask_to_end(process)
        assert process.wait() == 0, process.text()
        assert process.leftovers() == []


def test_a_frozen_worker_makes_the_server_unhealthy_until_it_goes_on(directory: Path) -> None:
    options = ["--plan", "1+1", "--health-timeout", "5", "--step-timeout", "100000"]
    with ServerProcess(directory, *options) as process:
        url = process.wait_until_ready()

        async def script() -> None:
            async with http_client(url) as client:
                [stream] = await open_streams(client, 1, 900)
                assert (await client.get("/health")).status_code == 200
                process.hurt("rank 1", signal.SIGSTOP)
                await until_status(client, "/health", 503)
                assert (await client.get("/livez")).status_code == 200
                process.hurt("rank 1", signal.SIGCONT)
                await until_status(client, "/health", 200)
                assert (await stream.end())["choices"][0]["finish_reason"] == "length"

        run(script())
        process.logged(
            r"rank 1 \(attention worker on cpu\) has sent no heartbeat for .* s; (last step \d+|it has .* no step)"
        )
        process.logged("unhealthy: ")
        ask_to_end(process)
        assert process.wait() == 0, process.text()


@pytest.mark.parametrize("role", ["rank 0", "rank 1", "driver"])
def test_the_death_of_a_process_ends_streams_with_an_error_and_the_server_with_1(role: str, directory: Path) -> None:
    with ServerProcess(directory, "--plan", "1+1") as process:
        url = process.wait_until_ready()

        async def script() -> None:
            async with http_client(url) as client:
                streams = await open_streams(client, 4, 900)
                process.hurt(role, signal.SIGKILL)
                for stream in streams:
                    error = (await stream.end())["error"]
                    assert error["code"] == "engine_dead"
                    assert "SIGKILL" not in error["message"], "no internals"

        run(script())
        assert process.wait() == 1, process.text()
        process_name = role if role == "driver" else f"{role} ("
        assert any(process_name in line and "SIGKILL" in line for line in process.err), process.text()
        assert process.leftovers() == []


def test_a_server_under_torchrun(directory: Path) -> None:
    with FleetProcess.torchrun(directory, 2, "serve", "--plan", "1+1", *SMALL, "--port", "0") as process:
        find = lambda: next((line for line in [*process.err] if "ready on http" in line), None)  # noqa: E731
        url = process.until(find, "the server is ready").partition("ready on ")[2].split()[0]
        body = {"prompt": "It was", "max_tokens": 5, "ignore_eos": True}
        found = httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE, trust_env=False)
        assert found.json()["usage"]["completion_tokens"] == 5
        ask_to_end(process)
        process.wait()
        assert not process.leftovers()
