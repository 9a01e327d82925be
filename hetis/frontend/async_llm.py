"""`AsyncLLM`: a fleet for asyncio programs, such as the HTTP server."""

import asyncio
import os
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import msgspec

from hetis.comm.control import FrontClient
from hetis.core import messages as m
from hetis.core.config import EngineConfig
from hetis.core.outputs import RequestOutput
from hetis.core.sampling_params import SamplingParams
from hetis.frontend.client import check_process
from hetis.frontend.errors import EngineDeadError
from hetis.frontend.frontend import Frontend, encode_requests
from hetis.frontend.intake import Intake, tokenizer_of
from hetis.frontend.options import make_config
from hetis.frontend.progress import MeasuringBar
from hetis.frontend.prompts import Prompt
from hetis.frontend.requests import Piece, Request
from hetis.launch.fleet import Fleet, start_fleet

Answer = TypeVar("Answer", bound=m.Message)


class AsyncLLM:
    """A model served by a fleet of devices, for one event loop; `make_request` and `close` may be called in any thread.

    An async context manager: it waits until the fleet is up, and `close` ends the fleet's processes. Of `dead_reason`,
    `is_open` and `is_ready` the program learns how the fleet is; calls raise EngineDeadError when it has ended.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        """Starts the fleet and returns at once. `model`, `options`: those of `LLM`, see `help(hetis.LLM)`.

        Raises ValueError for options that are wrong or do not fit together.
        """
        self.config: EngineConfig = make_config(model=model, **options)
        self._pid, self._fleet = os.getpid(), start_fleet(self.config)
        self._frontend = Frontend(self._fleet)
        self._finalizer = weakref.finalize(self, _close, self._frontend, self._fleet, self._pid)
        self._ready: m.EngineReady | None = None
        self._intake: Intake | None = None
        try:
            self.tokenizer = tokenizer_of(self.config)  # while the ranks start; None: prompts are token ids
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_config(cls, config: EngineConfig) -> "AsyncLLM":
        return cls(**msgspec.structs.asdict(config))

    # --- the fleet ----------------------------------------------------------------------------------------------------

    async def wait_until_ready(self) -> None:
        """Waits until the fleet is up; on a terminal, a bar shows how far measuring is.

        Raises EngineDeadError when the fleet fails, FleetRefusedError, a ValueError, when what was asked for is
        impossible.
        """
        with MeasuringBar(self.config.progress) as bar:
            ready = await self._ask(m.Attach(pid=self._pid), m.EngineReady, bar)
        self._ready = ready
        self._intake = self._intake or Intake(self.config, self.tokenizer, ready)

    @property
    def is_ready(self) -> bool:
        return self._ready is not None and self.is_open

    @property
    def is_open(self) -> bool:
        """Whether the fleet runs, as far as this process knows."""
        return os.getpid() == self._pid and self._frontend.end is None

    @property
    def dead_reason(self) -> str | None:
        """Why the fleet has ended; None while it runs."""
        return None if self._frontend.end is None else str(self._frontend.end)

    def on_end_request(self, act: Callable[[str], None]) -> None:
        """Has `act` called, with the reason, when a launcher such as torchrun wants the fleet to end.

        The program then has about 20 seconds to `close`. Without this call the request ends the fleet at once.
        """
        self._frontend.on_end_request = act

    @property
    def status(self) -> m.EngineStatus | None:
        """The latest that came with tokens: as old as the latest steps."""
        return self._frontend.status

    @property
    def vocab_size(self) -> int:
        return self._known().vocab_size

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together."""
        return self._known().max_model_len

    @property
    def eos_token_ids(self) -> list[int]:
        return self._known().eos_token_ids

    @property
    def ledger(self) -> str:
        """The memory table."""
        return self._known().ledger

    def _known(self) -> m.EngineReady:
        if self._ready is None:
            raise RuntimeError("the fleet is not up yet: await wait_until_ready().")
        return self._ready

    async def fleet_stats(self) -> m.FleetStats:
        """Counters of the fleet and of every rank: heads, pages, attention time, bytes sent over links."""
        return await self.ask(m.FleetQuery(), m.FleetStats)

    async def ask(self, question: m.Message, kind: type[Answer]) -> Answer:
        """The answer, of type `kind`, to a question; several tasks may ask at once."""
        return await self._ask(question, kind)

    async def _ask(self, question: m.Message, kind: type[Answer], bar: MeasuringBar | None = None) -> Answer:
        self._begin()
        items: Mailbox[Any] = Mailbox()
        self._frontend.ask(FrontClient.encode(question), kind, items.put)
        while not isinstance(answer := await items.get(), kind):
            if bar is not None:
                bar.follow(answer)
        return answer

    def _begin(self) -> None:
        """Starts the front end on the running loop. Raises what makes it useless."""
        check_process(self._pid)
        if self._frontend.end is not None:
            raise self._frontend.end.again()
        self._frontend.start()

    # --- requests -----------------------------------------------------------------------------------------------------

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        name: str = "prompt",
        add_special_tokens: bool = True,
    ) -> Request:
        """Reads, tokenises and checks a prompt, in the forms of `LLM.generate`. CPU work, for any thread.

        Raises ValueError that begins with `name` for a wrong prompt, or with the field of a wrong parameter.
        """
        self._known()
        assert self._intake is not None
        return self._intake.make(
            prompt, params, request_id=request_id, name=name, add_special_tokens=add_special_tokens
        )

    def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        """Yields the pieces of a request that has not been streamed before, until all its completions are finished.

        Closing the generator, or cancelling the task that waits for it, aborts what is unfinished.
        """
        return self._stream(request, Mailbox())

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields all that has been generated so far, again and again, in vLLM's form; the last one is `finished`.

        The arguments are those of `make_request`. Closing the generator aborts what is unfinished.
        """
        request = self.make_request(prompt, params, request_id=request_id)
        waiting: Mailbox[Piece] = Mailbox()
        async with aclosing(self._stream(request, waiting)) as pieces:
            async for _ in pieces:
                if waiting.is_empty:  # else the output has more than this piece, and is yielded with the last one
                    yield request.output()

    async def _stream(self, request: Request, items: "Mailbox[Piece]") -> AsyncGenerator[Piece, None]:
        self._begin()
        num_unfinished = request.num_completions
        self._frontend.open([request], encode_requests([request]), items.put)
        try:
            while num_unfinished:
                piece = await items.get()
                num_unfinished -= piece.finished
                yield piece
        finally:
            if num_unfinished:
                self._frontend.abandon([request])

    def abort(self, request_id: str) -> None:
        """Ends the streams of requests with this id: their last pieces have the finish reason "abort"."""
        self._frontend.abort(request_id)

    def abort_all(self) -> None:
        """Ends the streams of all requests in this way."""
        self._frontend.abort_all()

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends all processes of the fleet, which takes some seconds; may be called again, and in any thread."""
        self._finalizer()

    async def __aenter__(self) -> "AsyncLLM":
        try:
            await self.wait_until_ready()
        except BaseException:
            await asyncio.to_thread(self.close)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """What one task has not taken yet."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: deque[Item | BaseException] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_empty(self) -> bool:
        return not self._items

    def put(self, item: Item | BaseException) -> None:
        """A sink."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Item:
        """Waits for the next item. Raises it if it is an error: a copy of EngineDeadError, as each task gets one."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, EngineDeadError):
            raise item.again()
        if isinstance(item, BaseException):
            raise item
        return item


def _close(frontend: Frontend, fleet: Fleet, pid: int) -> None:
    if os.getpid() == pid:
        frontend.close_soon()
        fleet.end()
