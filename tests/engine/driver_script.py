"""A driver on sockets of the test's own.

Whenever the driver waits, the test's script goes on by one step, so nothing here depends on time.
"""

import io
import sys
from collections import defaultdict, deque
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hetis.core import messages as m
from hetis.core.config import DriverArgs, EngineConfig
from hetis.core.fleet import DeviceInfo
from hetis.core.plan import resolve_plan
from hetis.core.sampling_params import SamplingParams
from hetis.engine.driver import Driver
from tests.dispatcher.fleets import make_spec

SPEC = msgspec.structs.replace(make_spec(4, num_layers=4), intermediate_size=128, vocab_size=512, max_position=256)
STDIN = 1000  # a descriptor that the driver only asks the fake poller about
TO_RANK = m.Setup | m.Measure | m.MeasureLink | m.StepCommand | m.StatsQuery | m.Shutdown | m.Abort | m.Pong
Script = Generator[list[tuple[object, int]] | None, None, None]
FRONT, OTHER_FRONT = b"front", b"other"


class Sockets:
    """In place of a ControlServer and its poller: keeps what the driver sends, hands it what the script has put."""

    def __init__(self) -> None:
        self.poller = self
        self.script: Script  # and the driver that it is for: set by `run`
        self.driver: Driver
        self.now = 0.0
        self.is_hidden = False
        self.sent: list[tuple[str, bytes, Any]] = []
        self._inbox: dict[str, deque[tuple[bytes, m.Message]]] = defaultdict(deque)
        self._decoder = msgspec.msgpack.Decoder(TO_RANK)

    # --- the driver's side

    def register(self, what: object, flags: int = 0) -> None: ...

    def unregister(self, what: object) -> None: ...

    def poll(self, milliseconds: int) -> list[tuple[object, int]]:
        try:
            return next(self.script) or []
        except StopIteration:
            raise AssertionError("the driver waits for what the script does not do") from None

    def receive(self, client: str) -> tuple[bytes, m.Message] | None:
        return self._inbox[client].popleft() if self._inbox[client] else None

    def send(self, client: str, identity: bytes, message: m.Message | bytes) -> None:
        self.sent.append((client, identity, self._decoder.decode(message) if isinstance(message, bytes) else message))

    def hide(self) -> None:
        self.is_hidden = True

    # --- the script's side

    def put(self, client: str, identity: bytes, *messages: m.Message) -> None:
        self._inbox[client].extend((identity, message) for message in messages)

    def take(self, client: str, identity: bytes) -> list[Any]:
        """What one client has been sent since the last time."""
        taken = [message for where, whom, message in self.sent if (where, whom) == (client, identity)]
        self.sent = [each for each in self.sent if each[:2] != (client, identity)]
        return taken

    # --- what ranks do

    def hello(self, rank: int, free_memory: int = 1 << 30) -> None:
        info = DeviceInfo(
            rank=rank, device="cpu", name="", host="elsewhere", address="", pid=1000 + rank, num_threads=1,
            total_memory=1 << 30, free_memory=free_memory,
        )  # fmt: skip
        self.put("ranks", str(rank).encode(), m.Hello(info=info))

    def ready(self, rank: int) -> None:
        self.put("ranks", str(rank).encode(), m.Ready(rank=rank))

    def come_up(self) -> Script:
        """Both ranks join and load; for a fleet that is not measured."""
        self.hello(0)
        self.hello(1)
        yield None
        self.ready(0)
        self.ready(1)
        yield None
        self.take("ranks", b"0")
        self.take("ranks", b"1")

    def answer_step(self) -> m.StepCommand:
        """Takes the one command that both ranks must have been given; every row that samples draws token 7."""
        (command,), (same,) = self.take("ranks", b"0"), self.take("ranks", b"1")
        assert command == same
        tokens = np.full(len(command.sampled) // 4, 7, dtype=np.int32).tobytes()
        self.put("ranks", b"0", m.StepResult(step=command.step, tokens=tokens))
        return command


def set_last_word(monkeypatch: pytest.MonkeyPatch, word: bytes) -> None:
    """What rank 0 writes to the driver's standard input before it closes."""
    stdin = io.TextIOWrapper(io.BytesIO(word))
    monkeypatch.setattr(stdin, "fileno", lambda: STDIN, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)


def run(sockets: Sockets, script: Script, directory: Path | str = "", **options: Any) -> None:
    """Runs a driver of 1+1 to its end with the script, which must have come to its own."""
    config = EngineConfig(
        plan="1+1", device="cpu", kv_cache_memory=1 << 20, max_model_len=64, profile_cache=False,
        **({"dispatch": "even"} | options),
    )  # fmt: skip
    plan = resolve_plan(config.plan, SPEC, config.device, config.kv_cache_memory)
    args = DriverArgs(
        config=config, spec=SPEC, plan=plan, eos_token_ids=[3], run_directory=str(directory), address=None,
        announce=False, parent=1,
    )  # fmt: skip
    sockets.driver, sockets.script = Driver(args, sockets), script  # type: ignore[arg-type]
    sockets.driver.run()
    assert next(script, "the end") == "the end", "the driver ended before the script"


def request(name: str, **params: Any) -> m.AddRequest:
    return m.AddRequest(id=name, token_ids=[1, 2, 5], params=SamplingParams(**({"max_tokens": 2} | params)))
