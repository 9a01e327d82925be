"""The front end's thread that talks to the driver, and the inboxes that its callers wait for.

One thread owns the socket. Callers put encoded messages into a queue and wake it; answers go to the inbox of the call
that they belong to, and the end of the fleet goes to every inbox. So no caller takes what another one waits for, and
Ctrl-C cannot interrupt between receiving and delivering.

There are no locks: a signal handler, or the end of a generator that is collected, may call `close` or `forget` at any
moment, in the very thread that would hold one.
"""

import os
import threading
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import TypeVar

from hetis.comm.control import ControlClient, encode
from hetis.core import messages as m
from hetis.launch.fleet import Fleet
from hetis.processes.waker import Waker

POLL_SECONDS = 0.2  # where the system has no pidfd to tell when the agent ends

Answer = TypeVar("Answer", m.EngineReady, m.FleetStats, m.ProfileReport)


class EngineDeadError(RuntimeError):
    """The fleet has ended; the message says which rank failed, on which device, and why."""

    def again(self) -> "EngineDeadError":
        """A copy, for one more call that waited."""
        return type(self)(str(self))


class FleetRefusedError(EngineDeadError, ValueError):
    """The fleet ended because what was asked for is impossible."""


class Inbox:
    """Outputs that one call has not taken yet."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[list[m.TokenOutput] | EngineDeadError] = SimpleQueue()

    def put(self, item: list[m.TokenOutput] | EngineDeadError) -> None:
        self._queue.put(item)

    def get(self) -> list[m.TokenOutput]:
        """Waits for outputs; EngineDeadError when there will be none."""
        item = self._queue.get()
        if isinstance(item, EngineDeadError):
            raise item.again()
        return item


class Channel(threading.Thread):
    """Carries messages from its start to the end of the fleet.

    It holds no reference to the `EngineClient`, whose deletion ends the fleet.
    """

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(name="hetis front end", daemon=True)
        self._fleet = fleet
        self._control = ControlClient(f"ipc://{fleet.directory / 'front'}", f"front-{os.getpid()}", "front")
        self._waker = Waker()
        self._outgoing: SimpleQueue[bytes] = SimpleQueue()
        self._answers: SimpleQueue[m.Message | EngineDeadError] = SimpleQueue()
        self._inboxes: dict[str, Inbox] = {}  # by request
        self._closing = False
        self._end: EngineDeadError | None = None

    # --- any thread ---------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._end is None and not self._closing

    def open(self, request_ids: Iterable[str], requests: Iterable[m.Message]) -> Inbox:
        inbox = Inbox()
        self._inboxes.update(dict.fromkeys(request_ids, inbox))
        self._check_end()  # an end that comes later finds the inbox
        self.send(requests)
        return inbox

    def forget(self, request_id: str) -> None:
        self._inboxes.pop(request_id, None)

    def send(self, messages: Iterable[m.Message]) -> None:
        for message in messages:
            self._outgoing.put(encode(message))  # here, so that an error is the caller's
        self._waker.wake()

    def ask(self, question: m.Message, kind: type[Answer], on_progress: Callable[[m.Message], None]) -> Answer:
        """The answer to a question. For one thread at a time."""
        while not self._answers.empty():  # for calls that were interrupted
            self._answers.get()
        self._check_end()  # an end that comes later finds the queue empty
        self.send([question])
        while not isinstance(answer := self._answers.get(), kind):
            if isinstance(answer, EngineDeadError):
                raise answer.again()
            on_progress(answer)
        return answer

    def close(self) -> None:
        """Ends the fleet, and waits for that."""
        self._closing = True
        self._waker.wake()
        if threading.current_thread() is not self:  # the client may be collected in this thread
            self.join()

    def _check_end(self) -> None:
        if self._end is not None:
            raise self._end.again()

    # --- this thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            end = self._serve()
        except Exception as error:
            end = EngineDeadError(f"the front end failed: {type(error).__name__}: {error}")
        try:
            self._shut_down()
        finally:
            self._end_calls(end)

    def _end_calls(self, end: EngineDeadError) -> None:
        """Raises `end` in every call that waits, and in every later one."""
        self._end = end
        for inbox in set(self._inboxes.copy().values()):
            inbox.put(end)
        self._answers.put(end)

    def _serve(self) -> EngineDeadError:
        """Carries messages until the fleet ends or is closed; returns why."""
        end = self._fleet.fileno()
        wait = self._control.waiter(self._waker.fileno(), *([] if end is None else [end]), until_lost=False)
        seconds = POLL_SECONDS if end is None else None
        while not self._closing:
            self._send_all()
            wait(seconds)
            self._waker.drain()
            has_ended = self._fleet.has_ended()  # before the last messages are read
            while (message := self._control.receive(0)) is not None:
                if isinstance(message, m.EngineDead | m.EndRequested):
                    return self._explain(message.reason)
                self._deliver(message)
            if has_ended:
                return self._explain("the fleet ended without giving a reason.")
        return EngineDeadError("the fleet has been closed.")

    def _send_all(self) -> None:
        while True:
            try:
                self._control.send(self._outgoing.get_nowait())
            except Empty:
                return

    def _deliver(self, message: m.Message) -> None:
        if not isinstance(message, m.Outputs):
            self._answers.put(message)
            return
        found: dict[Inbox, list[m.TokenOutput]] = {}
        for new in message.outputs:
            inbox = self._inboxes.get(new.id.rpartition("/")[0])
            if inbox is not None:  # else it was aborted, and these tokens were drawn before the driver knew
                found.setdefault(inbox, []).append(new)
        for inbox, outputs in found.items():
            inbox.put(outputs)

    def _explain(self, reason: str) -> EngineDeadError:
        """The reason of the fleet. `reason`: where there is none."""
        recorded = self._fleet.reason()
        if recorded is None:
            return EngineDeadError(reason)
        return FleetRefusedError(recorded.text) if recorded.refused else EngineDeadError(recorded.text)

    def _shut_down(self) -> None:
        """Ends what still runs of the fleet."""
        self._send_all()
        self._fleet.end()
        self._control.close(linger=0)
