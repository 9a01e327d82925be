"""The front end for callers in any thread: it runs in a thread of its own, and each call waits at an inbox.

There are no locks: a signal handler, or the end of a generator that is collected, may call anything here at any
moment, in the very thread that would hold one. `call_soon_threadsafe` takes none either: it appends to a deque and
writes a byte to a socket. Each call first registers its inbox and then looks whether the front end has ended; the
thread notes the end first and then writes it to all inboxes. So no call waits for an answer that does not come, and as
no caller reads the socket, Ctrl-C cannot interrupt between receiving and delivering.
"""

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from hetis.comm.control import FrontClient
from hetis.core import messages as m
from hetis.core.config import EngineConfig
from hetis.frontend.errors import EngineDeadError, ForkedError
from hetis.frontend.frontend import Frontend, encode_requests
from hetis.frontend.progress import MeasuringBar
from hetis.frontend.requests import Piece, Request
from hetis.launch.fleet import Fleet, start_fleet

Answer = TypeVar("Answer", bound=m.Message)


class Inbox:
    """What one call has not taken yet: pieces, answers, and an error where there will be none."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self.put: Callable[[Any], None] = self._queue.put  # a sink

    def get(self) -> Any:
        """Waits for the next item. Raises it if it is an error: a copy of EngineDeadError, as each call gets one."""
        item = self._queue.get()
        if isinstance(item, EngineDeadError):
            raise item.again()
        if isinstance(item, BaseException):
            raise item
        return item


class EngineClient:
    """One fleet, for any thread. In a forked child every call but `close` raises ForkedError."""

    def __init__(self, config: EngineConfig, *, measure: bool = False) -> None:
        """Starts a fleet.

        Returns at once: `wait_until_ready` waits for the fleet. `measure`: every device and link is measured anew.
        Raises ValueError for settings that can be refused at once.
        """
        self._pid, self._progress = os.getpid(), config.progress
        self._thread = _start_thread(start_fleet(config, measure=measure))
        weakref.finalize(self, _close, self._thread, self._pid)

    @property
    def is_open(self) -> bool:
        """Whether the fleet runs, as far as this process knows."""
        return os.getpid() == self._pid and self._thread.is_open

    def wait_until_ready(self) -> m.EngineReady:
        """Waits until the fleet is up; on a terminal, a bar shows how far measuring is.

        Raises EngineDeadError when the fleet fails, FleetRefusedError when what was asked for is impossible.
        """
        with MeasuringBar(self._progress) as bar:
            return self.ask(m.Attach(pid=self._pid), m.EngineReady, bar.follow)

    def ask(
        self, question: m.Message, kind: type[Answer], on_progress: Callable[[m.Measuring], None] = lambda _: None
    ) -> Answer:
        """The answer to a question. EngineDeadError when there will be none.

        `on_progress`: called with what comes before the answer.
        """
        with self.inbox() as inbox:
            self._thread.post(Frontend.ask, FrontClient.encode(question), kind, inbox.put)
            while not isinstance(answer := inbox.get(), kind):
                on_progress(answer)
            return answer

    @contextmanager
    def inbox(self) -> Iterator[Inbox]:
        """An inbox for the block. EngineDeadError when the fleet has ended; a later end goes to the inbox."""
        self._check_process()
        inbox, thread = Inbox(), self._thread
        thread.inboxes.add(inbox)
        try:
            if thread.end is not None:
                raise thread.end.again()
            yield inbox
        finally:
            thread.inboxes.discard(inbox)

    def open(self, requests: Iterable[Request], inbox: Inbox) -> None:
        """Sends requests, whose pieces go to `inbox`. Raises ValueError for one that is too large to send."""
        requests = list(requests)
        self._thread.post(Frontend.open, requests, encode_requests(requests), inbox.put)

    def stream(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """Sends requests and yields their pieces until all are finished. Leaving it early aborts what is unfinished."""
        num_unfinished = sum(request.num_completions for request in requests)
        with self.inbox() as inbox:
            try:
                self.open(requests, inbox)
                while num_unfinished:
                    piece = inbox.get()
                    num_unfinished -= piece.finished
                    yield piece
            finally:
                if num_unfinished and self.is_open:
                    self._thread.post(Frontend.abandon, requests)

    def close(self) -> None:
        """Ends the fleet, which has some seconds to end in order, and waits for that.

        May be called again, from several threads, from a signal handler, and in a forked child, where it does nothing.
        """
        _close(self._thread, self._pid)

    def _check_process(self) -> None:
        check_process(self._pid)


def check_process(pid: int) -> None:
    """Raises ForkedError in a child of the process `pid`, which started the fleet."""
    if os.getpid() != pid:
        raise ForkedError(
            f"this fleet belongs to process {pid}, and a forked child cannot use it: "
            "make the LLM in the child, or use threads."
        )


class _Thread(threading.Thread):
    """A `Frontend` on a loop of its own, from the start of the fleet to its end, which this thread completes.

    It holds no reference to the `EngineClient`, whose deletion ends the fleet.
    """

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(name="hetis front end", daemon=True)
        self._fleet = fleet
        self._loop = asyncio.SelectorEventLoop()  # whatever the program has as its policy
        self._loop.set_exception_handler(lambda _, context: self._fail(context.get("exception")))
        self._ended: asyncio.Future[EngineDeadError] = self._loop.create_future()
        self._frontend = Frontend(fleet, self._on_end)
        self._loop.call_soon(self._frontend.start)  # before anything that is posted
        self._is_closing = False
        self.inboxes: set[Inbox] = set()  # of the calls that wait
        self.end: EngineDeadError | None = None

    @property
    def is_open(self) -> bool:
        return self.end is None and not self._is_closing

    def post(self, method: Callable[..., None], *arguments: Any) -> None:
        """Has the thread call a method of its `Frontend`. Does nothing when it has ended, which inboxes report."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(method, self._frontend, *arguments)

    def close(self) -> None:
        """Ends the fleet, and waits for that."""
        self._is_closing = True
        self.post(Frontend.close)
        if threading.current_thread() is not self:  # the client may be collected in this thread
            self.join()

    def run(self) -> None:
        end = self._loop.run_until_complete(self._ended)
        try:
            self.give_up()
        finally:
            self.end = end
            for inbox in self.inboxes.copy():
                inbox.put(end)

    def _on_end(self, end: EngineDeadError) -> None:
        if not self._ended.done():
            self._ended.set_result(end)

    def _fail(self, error: object) -> None:
        """Ends the front end after an error of its own, for which calls would wait for ever."""
        self._on_end(EngineDeadError(f"the front end failed: {type(error).__name__}: {error}"))

    def give_up(self) -> None:
        """Ends what still runs of the fleet."""
        self._frontend.close()
        self._fleet.end()
        self._loop.close()


def _start_thread(fleet: Fleet) -> _Thread:
    """Ends the fleet if the thread cannot be started."""
    thread = _Thread(fleet)
    try:
        thread.start()
    except BaseException:
        thread.give_up()
        raise
    return thread


def _close(thread: _Thread, pid: int) -> None:
    if os.getpid() == pid:
        thread.close()
