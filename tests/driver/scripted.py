"""The driver with sockets of the test, which sees what it sends and says what it receives.

Whenever the driver waits, the script of the test goes on by one step, so nothing depends on time.
"""

import os
from collections import defaultdict, deque
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec

from hetis.core import messages as m
from hetis.core.config import DriverArgs, EngineConfig
from hetis.core.device_info import DeviceInfo
from hetis.core.messages.step_command import decode
from hetis.core.plan_sources import resolve_plan
from hetis.core.sampling_params import SamplingParams
from hetis.driver.driver import run_job
from hetis.driver.members import Members
from hetis.processes.failure import FailureReason, FailureRecord
from tests.dispatcher.fleets import make_spec

SPEC = msgspec.structs.replace(make_spec(4, num_layers=4), intermediate_size=128, vocab_size=512, max_position=256)
OWNER = 1000  # a descriptor that only the fake poller knows
END = [(OWNER, 1)]  # what the poller returns when the agent ends the job
TO_RANK = m.Setup | m.Measure | m.MeasureLink | m.StepCommand | m.StatsQuery | m.Shutdown
Script = Generator[list[tuple[object, int]] | None, None, None]
FRONT, OTHER_FRONT, THIRD_FRONT = b"front", b"other", b"third"
AGENT, OTHER_AGENT = b"agent-0", b"agent-1"
ATTACH = m.Attach(pid=os.getpid())


class Sockets:
    """A stand-in for ControlServer and its poller: keeps what the driver sends, gives it what the script has put."""

    def __init__(self, directory: Path) -> None:
        """`directory`: of the run."""
        self.poller, self.directory = self, directory
        self.script: Script  # set by `run`
        self.script_error: AssertionError | None = None  # which the driver takes for a failure of its own
        self.now = 0.0
        self.registered: list[object] = []
        self.sent: list[tuple[str, bytes, Any]] = []
        self._inbox: dict[str, deque[tuple[bytes, m.Message]]] = defaultdict(deque)
        self._decoder = msgspec.msgpack.Decoder(TO_RANK)

    # --- the driver's side

    def register(self, what: object, flags: int = 0) -> None:
        self.registered.append(what)

    def unregister(self, what: object) -> None: ...

    def poll(self, milliseconds: int) -> list[tuple[object, int]]:
        try:
            return next(self.script) or []
        except StopIteration:
            self.script_error = AssertionError("the driver waits for what the script does not do")
        except AssertionError as error:
            self.script_error = error
        raise self.script_error

    def receive(self, client: str) -> tuple[bytes, m.Message] | None:
        return self._inbox[client].popleft() if self._inbox[client] else None

    def send(self, client: str, identity: bytes, message: m.Message | bytes) -> None:
        self.sent.append((client, identity, self._decoder.decode(message) if isinstance(message, bytes) else message))

    # --- the script's side

    def put(self, client: str, identity: bytes, *messages: m.Message) -> None:
        self._inbox[client].extend((identity, message) for message in messages)

    def take(self, client: str, identity: bytes) -> list[Any]:
        """Messages to one client since the last time."""
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
        """Takes and answers the one command that both ranks must have been given."""
        (command,), (same,) = self.take("ranks", b"0"), self.take("ranks", b"1")
        assert command == same
        self.answer(command)
        return command

    def answer(self, command: m.StepCommand) -> None:
        """Every row that samples draws token 7."""
        tokens = [7] * len(decode(command, 0).sampling_row_I)
        self.put("ranks", b"0", m.StepResult(step=command.step, tokens=tokens))


def make_args(directory: Path, *, measure: bool = False, **options: Any) -> DriverArgs:
    """For a fleet of 1+1. Steps are answered one by one, so none is sent ahead unless a test says so."""
    config = EngineConfig(
        plan="1+1", device="cpu", kv_cache_memory=1 << 20, max_model_len=64, profile_cache=False,
        **({"dispatch": "even", "async_scheduling": False} | options),
    )  # fmt: skip
    plan = resolve_plan(config.plan, SPEC, config.device, config.kv_cache_memory)
    return DriverArgs(
        config=config, measure=measure, spec=SPEC, plan=plan, eos_token_ids=[3], run_directory=str(directory),
        address=None,
    )  # fmt: skip


def run(sockets: Sockets, script: Script, **options: Any) -> None:
    """Runs a job that ends in order, with the script, which must have ended, too."""
    assert exit_code(sockets, script, **options) == 0
    assert FailureRecord(sockets.directory).read() is None


def run_failing(sockets: Sockets, script: Script, **options: Any) -> FailureReason:
    """Runs a job that fails; the recorded reason."""
    assert exit_code(sockets, script, **options) == 1
    reason = FailureRecord(sockets.directory).read()
    assert reason is not None
    return reason


def exit_code(sockets: Sockets, script: Script, **options: Any) -> int:
    args, sockets.script = make_args(sockets.directory, **options), script
    code = run_job(args, Members(args, sockets, OWNER))  # type: ignore[arg-type]
    if sockets.script_error is not None:
        raise sockets.script_error
    assert next(script, "the end") == "the end", "the driver ended before the script"
    return code


def request(name: str, **params: Any) -> m.AddRequest:
    full = SamplingParams(**({"max_tokens": 2} | params))
    return m.AddRequest(id=name, token_ids=[1, 2, 5], prompt_len=3, seed=0, params=full)


def attach(sockets: Sockets, *fronts: bytes) -> Script:
    """A fleet comes up with these front ends."""
    for front in fronts:
        sockets.put("front", front, ATTACH)
    yield from sockets.come_up()
    for front in fronts:
        assert [type(message) for message in sockets.take("front", front)] == [m.EngineReady]


def take_tokens(sockets: Sockets, front: bytes) -> dict[str, tuple[list[int], str | None]]:
    """By sequence: the tokens that a front end has got, and why the sequence ended."""
    found: dict[str, tuple[list[int], str | None]] = {}
    for outputs in sockets.take("front", front):
        assert isinstance(outputs, m.Outputs)
        for output in outputs.outputs:
            tokens, _ = found.get(output.id, ([], None))
            found[output.id] = [*tokens, *output.token_ids], output.finish_reason
    return found
