"""The front end on one event loop: requests to the driver, its tokens to the streams that wait for them.

`LLM` runs it in a thread with a loop of its own (`client.py`), `AsyncLLM` on the loop of the program. A call that waits
gives a sink, a function that takes what has come and returns at once.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

from hetis.comm.control import LINGER_SECONDS, FrontClient
from hetis.core import messages as m
from hetis.frontend.errors import EngineDeadError, FleetRefusedError
from hetis.frontend.requests import Piece, Request
from hetis.launch.fleet import Fleet

POLL_SECONDS = 0.2  # where the system has no descriptor to tell when the fleet ends

PieceSink = Callable[[Piece | BaseException], None]
AnswerSink = Callable[[m.Message | EngineDeadError], None]

_log = logging.getLogger("hetis")
_numbers = count(1)  # of the front ends of this process


class Frontend:
    """A front end of a fleet, from `start` to the end of either. Its methods are for the thread of the loop.

    It holds no reference to its owner, whose deletion ends the fleet.
    """

    def __init__(self, fleet: Fleet, on_end: Callable[[EngineDeadError], None] | None = None) -> None:
        """`on_end`: called once with the error that ended it, in place of all sinks; None: sinks get it at once."""
        self._fleet, self._on_end = fleet, on_end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._control: FrontClient | None = None
        self._running: dict[str, tuple[Request, PieceSink]] = {}  # by key
        self._questions: dict[type[m.Message], deque[tuple[bytes, AnswerSink]]] = {}  # the first one has been sent
        self.on_end_request: Callable[[str], None] | None = None  # None: what a launcher requests ends all calls
        self.status: m.EngineStatus | None = None  # the latest that came with tokens
        self.end: EngineDeadError | None = None

    def start(self) -> None:
        """Connects, on the running loop; later calls do nothing. RuntimeError on another loop than the first one's."""
        loop = asyncio.get_running_loop()
        if self._loop is not None or self.end is not None:
            if self._loop not in (None, loop):
                raise RuntimeError("this front end belongs to another event loop: use it on that one.")
            return
        self._loop = loop
        self._control = FrontClient(self._fleet.directory, f"front-{os.getpid()}-{next(_numbers)}")
        loop.add_reader(self._control.fileno(), self._read)
        fd = self._fleet.fileno()
        if fd is None:
            self._poll()
        else:
            loop.add_reader(fd, self._on_fleet_end)

    # --- what callers want --------------------------------------------------------------------------------------------

    def open(self, requests: Sequence[Request], payloads: Iterable[bytes], sink: PieceSink) -> None:
        """Sends requests, whose pieces go to `sink`. `payloads`: see `encode_requests`."""
        self._running.update((request.key, (request, sink)) for request in requests)
        self._send(payloads)

    def abandon(self, requests: Iterable[Request]) -> None:
        """Aborts what is unfinished of these requests; nothing more goes to their sinks."""
        for request in requests:
            if self._running.pop(request.key, None) is not None:
                self._send(map(FrontClient.encode, request.aborts()))

    def abort(self, request_id: str) -> None:
        """Finishes requests with this id with the reason "abort"."""
        for request, sink in [each for each in self._running.values() if each[0].id == request_id]:
            self.abandon([request])
            for piece in request.abort():
                sink(piece)

    def abort_all(self) -> None:
        """Finishes all requests with the reason "abort"."""
        for request_id in {request.id for request, _ in self._running.values()}:
            self.abort(request_id)

    def ask(self, question: bytes, kind: type[m.Message], sink: AnswerSink) -> None:
        """Has the answer, of type `kind`, go to `sink`.

        Of one kind one question at a time is sent, so that no answer is older than its question.
        """
        waiting = self._questions.setdefault(kind, deque())
        waiting.append((question, sink))
        if len(waiting) == 1:
            self._send([question])

    def close(self) -> None:
        """Ends this front end, not the fleet."""
        if self._control is not None and self.end is None:
            self._control.send(FrontClient.encode(m.Detach()))
        self._finish(EngineDeadError("the fleet has been closed."), linger=LINGER_SECONDS)

    def close_soon(self) -> None:
        """`close`, from any thread: at once where no loop runs or this thread runs it, else by the loop."""
        loop = self._loop
        if loop is None or not loop.is_running() or loop is _running_loop():
            self.close()
        else:
            loop.call_soon_threadsafe(self.close)

    def _send(self, payloads: Iterable[bytes]) -> None:
        if self.end is not None:
            return
        assert self._control is not None, "the front end has not been started"
        assert self._loop is not None
        for payload in payloads:
            self._control.send(payload)
        self._loop.call_soon(self._read)  # sending may have taken the edge of the descriptor

    # --- what the driver says -----------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while self.end is None and self._control is not None and (message := self._control.receive()) is not None:
                self._on_message(message)
        except Exception as error:
            self._finish(EngineDeadError(f"the front end failed: {type(error).__name__}: {error}"))

    def _on_message(self, message: Any) -> None:
        match message:
            case m.Outputs():
                self.status = message.status or self.status
                for new in message.outputs:
                    self._on_output(new)
            case m.Measuring():
                for _, sink in self._questions.get(m.EngineReady, ()):
                    sink(message)
            case m.EndRequested() if self.on_end_request is not None:
                self.on_end_request(message.reason)
            case m.EngineDead() | m.EndRequested():
                self._finish(self._explain(message.reason))
            case m.Refused():
                _log.error("the driver refused a message: %s", message.reason)
            case _:
                self._on_answer(message)

    def _on_output(self, new: m.TokenOutput) -> None:
        found = self._running.get(new.id.rpartition("/")[0])
        if found is None:  # it was aborted, and this token was drawn before the driver knew
            return
        request, sink = found
        try:
            piece, abort = request.add(new)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of a tokenizer, whose panics are no Exception: it concerns no other request
            self.abandon([request])
            sink(error)
            return
        if request.finished:
            del self._running[request.key]
        if abort is not None:
            self._send([FrontClient.encode(abort)])
        if piece is not None:
            sink(piece)

    def _on_answer(self, message: m.Message) -> None:
        waiting = self._questions.get(type(message))
        if waiting is None:
            return
        _, sink = waiting.popleft()
        if waiting:
            self._send([waiting[0][0]])
        else:
            del self._questions[type(message)]
        sink(message)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        if self.end is None and self._loop is not None:
            if self._fleet.has_ended():
                self._on_fleet_end()
            else:
                self._loop.call_later(POLL_SECONDS, self._poll)

    def _on_fleet_end(self) -> None:
        self._read()  # the last messages
        self._finish(self._explain("the fleet ended without giving a reason."))

    def _explain(self, reason: str) -> EngineDeadError:
        """`reason`: where the fleet has recorded none."""
        recorded = self._fleet.reason()
        if recorded is None:
            return EngineDeadError(reason)
        return FleetRefusedError(recorded.text) if recorded.refused else EngineDeadError(recorded.text)

    def _finish(self, end: EngineDeadError, linger: float = 0) -> None:
        """`linger`: seconds that messages may take to be sent."""
        if self.end is not None:
            return
        self.end = end
        if self._control is not None and self._loop is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._control.fileno())
                if (fd := self._fleet.fileno()) is not None:
                    self._loop.remove_reader(fd)
            self._control.close(linger)
        if self._on_end is None:
            self._end_calls(end)
        else:
            self._on_end(end)

    def _end_calls(self, end: EngineDeadError) -> None:
        running, self._running = self._running, {}
        questions, self._questions = self._questions, {}
        for _, sink in running.values():
            sink(end)
        for waiting in questions.values():
            for _, answer in waiting:
                answer(end)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that this thread runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def encode_requests(requests: Iterable[Request]) -> list[bytes]:
    """Messages that start the unfinished completions. Raises ValueError for a request that the driver would refuse for
    its size."""
    return [FrontClient.encode(message) for request in requests for message in request.messages()]
