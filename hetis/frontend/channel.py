"""The front end's thread that talks to the driver, and what its callers wait for.

One thread owns the socket. Callers put encoded messages into a queue and wake it; what comes back goes to the inbox of
the call that it belongs to, and whatever ends the fleet reaches every inbox. So no caller ever takes what another one
waits for, and Ctrl-C never strikes between receiving and delivering.

Nothing here takes a lock: a signal handler or a generator that is collected may call `close` or `forget` anywhere, in
the thread that would hold it.
"""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from hetis.comm.control import ControlClient, encode
from hetis.core import messages as m
from hetis.launch.local_launcher import end_launcher
from hetis.processes import supervision

POLL_SECONDS = 0.2  # where the system does not say when a process ends

Answer = TypeVar("Answer", m.EngineReady, m.FleetStats, m.ProfileReport)


class EngineDeadError(RuntimeError):
    """The fleet is gone; the message says which rank on which device, and why."""

    def again(self) -> "EngineDeadError":
        """The same error for one more call that waited."""
        return type(self)(str(self))


class FleetRefusedError(EngineDeadError, ValueError):
    """The fleet ended because it cannot be what was asked for."""


class Inbox:
    """What came for one call and has not been taken yet."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[list[m.TokenOutput] | EngineDeadError] = SimpleQueue()

    def put(self, item: list[m.TokenOutput] | EngineDeadError) -> None:
        self._queue.put(item)

    def get(self) -> list[m.TokenOutput]:
        """Waits for new tokens; EngineDeadError when there will be none."""
        item = self._queue.get()
        if isinstance(item, EngineDeadError):
            raise item.again()
        return item


class Channel(threading.Thread):
    """Carries messages from its start to the end of the fleet. It never refers to the `EngineClient`, whose deletion
    ends the fleet."""

    def __init__(self, directory: Path, launcher: "subprocess.Popen[bytes] | None") -> None:
        """`launcher`: of the ranks; None under torchrun, where they and `directory` belong to rank 0."""
        super().__init__(name="hetis front end", daemon=True)
        self._directory, self._launcher = directory, launcher
        self._control = ControlClient(f"ipc://{directory / 'front'}", f"front-{os.getpid()}", "front")
        self._waker = supervision.Waker()
        self._launcher_end = None if launcher is None else supervision.open_pidfd(launcher.pid)
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
        """For one thread at a time."""
        while not self._answers.empty():  # to calls that were interrupted
            self._answers.get()
        self._check_end()  # an end that comes later finds the queue empty
        self.send([question])
        while not isinstance(answer := self._answers.get(), kind):
            if isinstance(answer, EngineDeadError):
                raise answer.again()
            on_progress(answer)
        return answer

    def close(self) -> None:
        """Returns when the fleet has ended."""
        self._closing = True
        self._waker.wake()
        if threading.current_thread() is not self:  # collected here: the end comes soon
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
        """Every call that waits, and every later one, gets `end`."""
        self._end = end
        for inbox in set(self._inboxes.copy().values()):
            inbox.put(end)
        self._answers.put(end)

    def _serve(self) -> EngineDeadError:
        """Carries messages until the fleet ends or is to be closed; why."""
        others = [self._waker.fileno()] + ([] if self._launcher_end is None else [self._launcher_end])
        wait = self._control.waiter(*others, until_lost=self._launcher is None)
        seconds = POLL_SECONDS if self._launcher is not None and self._launcher_end is None else None
        while not self._closing:
            self._send_all()
            wait(seconds)
            self._waker.drain()
            has_ended = self._has_ended()  # before the last messages are read
            while (message := self._control.receive(0)) is not None:
                if isinstance(message, m.EngineDead):
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
            if inbox is not None:  # else aborted; these tokens were drawn before the driver knew
                found.setdefault(inbox, []).append(new)
        for inbox, outputs in found.items():
            inbox.put(outputs)

    def _has_ended(self) -> bool:
        return self._control.is_lost if self._launcher is None else self._launcher.poll() is not None

    def _explain(self, reason: str) -> EngineDeadError:
        """The best explanation there is."""
        code = self._launcher.poll() if self._launcher is not None else None
        verdict = supervision.read_verdict(self._directory)
        if code is not None and code < 0:  # and the ranks with it
            return EngineDeadError(f"the launcher of the ranks was killed by {supervision.signal_name(-code)}.")
        if verdict is None:
            return EngineDeadError(reason)
        return FleetRefusedError(verdict.reason) if verdict.refused else EngineDeadError(verdict.reason)

    def _shut_down(self) -> None:
        """Ends what is left of the fleet."""
        self._send_all()
        self._control.send(m.Shutdown())
        if self._launcher is None:
            self._control.close()
            return
        end_launcher(self._launcher)
        self._control.close(linger=0)
        if self._launcher_end is not None:
            os.close(self._launcher_end)
        shutil.rmtree(self._directory, ignore_errors=True)
