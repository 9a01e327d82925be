"""A fleet without processes: the driver's end of the control sockets in the hands of the test."""

import asyncio
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from hetis.comm.control import ControlServer
from hetis.core import messages as m
from hetis.frontend import async_llm
from hetis.frontend.async_llm import AsyncLLM
from hetis.frontend.tokenizer import load_tokenizer
from hetis.processes.failure import FailureReason
from tests.comm.control_helpers import take

READY = m.EngineReady(max_model_len=1024, vocab_size=3072, ledger="", eos_token_ids=[0])


class StandInFleet:
    """Has the interface of `Fleet`, and plays the driver."""

    def __init__(self, directory: Path, *, has_descriptor: bool = True) -> None:
        self.directory = directory
        self._reader, self._writer = os.pipe()
        self._has_descriptor, self._reason, self._has_ended = has_descriptor, None, False
        self._server = ControlServer(str(directory), None)
        self._front = b""

    # --- the interface

    def fileno(self) -> int | None:
        return self._reader if self._has_descriptor else None

    def has_ended(self) -> bool:
        return self._has_ended

    def reason(self) -> FailureReason | None:
        return self._reason

    def end(self) -> None:
        self._has_ended = True

    # --- the test's side

    def die(self, reason: FailureReason | None) -> None:
        self._reason, self._has_ended = reason, True
        os.write(self._writer, b"\0")

    async def take(self) -> Any:
        """The next message of the front end."""
        self._front, message = await asyncio.to_thread(take, self._server, "front")
        return message

    async def take_all(self, count: int) -> list[Any]:
        return [await self.take() for _ in range(count)]

    def say(self, *messages: m.Message) -> None:
        for message in messages:
            self._server.send("front", self._front, message)

    def tokens(self, *outputs: m.TokenOutput) -> None:
        self.say(m.Outputs(outputs=list(outputs)))

    def close(self) -> None:
        self._server.close()
        os.close(self._reader)
        os.close(self._writer)


@lru_cache
def tokenizer() -> Any:
    """That of the model in the package."""
    return load_tokenizer(None, None)


def make(fleet: StandInFleet, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncLLM:
    """An `AsyncLLM` of that fleet."""
    monkeypatch.setattr(async_llm, "start_fleet", lambda config: fleet)
    monkeypatch.setattr(async_llm, "tokenizer_of", lambda config: tokenizer())
    return AsyncLLM(device="cpu", **options)


async def start(fleet: StandInFleet, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncLLM:
    """An `AsyncLLM` of that fleet, which is up."""
    llm = make(fleet, monkeypatch, **options)
    ready = asyncio.create_task(llm.wait_until_ready())
    assert await fleet.take() == m.Attach(pid=os.getpid())
    fleet.say(READY)
    await ready
    return llm
