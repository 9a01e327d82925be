"""A front end's hold on a fleet: starts it or attaches to it, sends requests, receives tokens, ends it.

Any thread may use it. One thread of its own (`_Channel`) owns the socket: callers leave encoded messages in a queue and
ring; what comes back goes to the inbox of the call that it belongs to, and whatever ends the fleet reaches every inbox.
So no caller ever takes what another one waits for, and Ctrl-C never strikes between receiving and handing out.
"""

import os
import shutil
import signal
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from hetis.comm import supervision
from hetis.comm.control import ControlClient, encode
from hetis.core import messages as m
from hetis.core.config import EngineConfig
from hetis.core.plan import Plan
from hetis.server import launch
from hetis.server.capacity import check_processes
from hetis.server.local_launcher import end_launcher, start_launcher
from hetis.server.progress import ProgressBar, progress_bar

POLL_SECONDS = 0.2  # where the system does not tell when a process ends

_Answer = TypeVar("_Answer", m.EngineReady, m.FleetStats, m.ProfileReport)


class EngineDeadError(RuntimeError):
    """The fleet is gone; the message says which rank on which device, and why."""


class FleetRefusedError(EngineDeadError, ValueError):
    """The fleet ended because it cannot be what was asked for."""


class ForkedError(RuntimeError):
    """The process was forked after the fleet was started: the connection to it belongs to the parent."""


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
            raise type(item)(str(item))
        return item


class EngineClient:
    """One fleet. Safe to use from threads; not from a forked child, where every call raises ForkedError."""

    def __init__(self, config: EngineConfig, plan: Plan) -> None:
        """Starts the ranks on this host, or, as the front end under torchrun, attaches to those that run.

        Returns at once: `wait_until_ready` waits for the fleet.
        """
        self._pid, self._progress = os.getpid(), config.progress
        self._asking = threading.Lock()
        launcher = None
        if launch.fleet_directory is not None:
            directory = launch.fleet_directory
        else:
            if not config.oversubscribe:
                check_processes(plan)
            directory = launch.make_run_directory()
            launcher = start_launcher(config, plan, directory)
        self._channel = _Channel(directory, launcher)
        self._finalizer = weakref.finalize(self, _close, self._channel, self._pid)
        self._channel.start()

    @property
    def is_open(self) -> bool:
        """Whether there is a fleet to talk to, as far as this end knows."""
        return os.getpid() == self._pid and self._channel.is_open

    def wait_until_ready(self) -> m.EngineReady:
        """EngineDeadError when the fleet fails, FleetRefusedError when it cannot be what was asked for.

        Shows how far measuring is, on a terminal.
        """
        with _MeasuringBar(self._progress) as bar:
            return self.ask(m.Attach(), m.EngineReady, bar.follow)

    def ask(
        self, question: m.Message, kind: type[_Answer], on_news: Callable[[m.Message], None] = lambda _: None
    ) -> _Answer:
        """The answer to a question, one at a time; EngineDeadError when there will be none. `on_news`: gets what comes
        before the answer.
        """
        self._check_process()
        with self._asking:
            return self._channel.ask(question, kind, on_news)

    def open(self, request_ids: Iterable[str], requests: Iterable[m.Message]) -> Inbox:
        """Sends `requests`; their tokens, and those of all sequences called `request_id/...`, come to the inbox.

        EngineDeadError when the fleet has failed, or has been closed.
        """
        self._check_process()
        return self._channel.open(request_ids, requests)

    def send(self, messages: Iterable[m.Message]) -> None:
        """Lost, if the fleet has ended: the inboxes say so."""
        self._check_process()
        self._channel.send(messages)

    def forget(self, request_id: str) -> None:
        """Nothing more is wanted of this request."""
        self._channel.forget(request_id)

    def close(self) -> None:
        """Ends the fleet; it has some seconds to do so in order. Harmless when called again, and in a forked child."""
        self._finalizer()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"this fleet belongs to process {self._pid}, and a forked child cannot use it: "
                "make the LLM in the child, or use threads."
            )


class _MeasuringBar(ExitStack):
    """How far measuring is, from the first message about it to the end of the block."""

    def __init__(self, show: bool) -> None:
        super().__init__()
        self._show, self._done = show, 0
        self._bar: ProgressBar | None = None

    def follow(self, news: m.Message) -> None:
        if not isinstance(news, m.Measuring):
            return
        if self._bar is None:
            self._bar = self.enter_context(progress_bar("measuring devices and links", news.total, show=self._show))
        self._bar.advance(news.done - self._done)
        self._done = news.done


def _close(channel: "_Channel", pid: int) -> None:
    if os.getpid() == pid:
        channel.close()


class _Channel(threading.Thread):
    """The thread that talks to the driver, from the first message to the end of the fleet.

    It never refers to the `EngineClient`, whose deletion ends the fleet.
    """

    def __init__(self, directory: Path, launcher: "subprocess.Popen[bytes] | None") -> None:
        super().__init__(name="hetis front end", daemon=True)
        self._directory, self._launcher = directory, launcher
        self._control = ControlClient(f"ipc://{directory / 'front'}", f"front-{os.getpid()}", "front")
        self._bell = supervision.Bell()
        self._launcher_end = None if launcher is None else supervision.open_pidfd(launcher.pid)
        self._outgoing: SimpleQueue[bytes] = SimpleQueue()
        self._answers: SimpleQueue[m.Message | EngineDeadError] = SimpleQueue()
        self._lock = threading.RLock()  # a generator that is collected while it is held calls `forget`
        self._inboxes: dict[str, Inbox] = {}  # by request
        self._closing = False
        self._end: EngineDeadError | None = None

    # --- any thread ---------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._end is None and not self._closing

    def open(self, request_ids: Iterable[str], requests: Iterable[m.Message]) -> Inbox:
        inbox = Inbox()
        with self._lock:
            self._check_end()
            self._inboxes |= dict.fromkeys(request_ids, inbox)
        self.send(requests)
        return inbox

    def forget(self, request_id: str) -> None:
        with self._lock:
            self._inboxes.pop(request_id, None)

    def send(self, messages: Iterable[m.Message]) -> None:
        for message in messages:
            self._outgoing.put(encode(message))  # here, so that an error is the caller's
        self._ring()

    def ask(self, question: m.Message, kind: type[_Answer], on_news: Callable[[m.Message], None]) -> _Answer:
        with self._lock:
            self._check_end()
            while not self._answers.empty():  # to somebody who did not wait for it
                self._answers.get()
        self.send([question])
        while not isinstance(answer := self._answers.get(), kind):
            if isinstance(answer, EngineDeadError):
                raise type(answer)(str(answer))
            on_news(answer)
        return answer

    def close(self) -> None:
        self._closing = True
        self._ring()
        if threading.current_thread() is not self:  # collected here: the end comes soon
            self.join()

    def _ring(self) -> None:
        with self._lock:
            if self._end is None:
                self._bell.ring()

    def _check_end(self) -> None:
        if self._end is not None:
            raise type(self._end)(str(self._end))

    # --- this thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            end = self._serve()
        except Exception as error:
            end = EngineDeadError(f"the front end failed: {type(error).__name__}: {error}")
        try:
            self._shut_down()
        finally:
            self._tell_all(end)

    def _tell_all(self, end: EngineDeadError) -> None:
        with self._lock:
            self._end = end
            for inbox in {id(inbox): inbox for inbox in self._inboxes.values()}.values():
                inbox.put(end)
            self._answers.put(end)
            self._bell.close()

    def _serve(self) -> EngineDeadError:
        """Carries messages until the fleet ends or is to be closed; why."""
        others = [self._bell.fileno()] + ([] if self._launcher_end is None else [self._launcher_end])
        wait = self._control.waiter(*others, until_lost=self._launcher is None)
        seconds = POLL_SECONDS if self._launcher is not None and self._launcher_end is None else None
        while not self._closing:
            self._send_all()
            wait(seconds)
            self._bell.heard()
            has_ended = self._has_ended()  # before the last messages are read
            while (message := self._control.receive(0)) is not None:
                if isinstance(message, m.EngineDead):
                    return self._explain(message.reason)
                self._hand_out(message)
            if has_ended:
                return self._explain("the fleet ended without a word.")
        return EngineDeadError("the fleet has been closed.")

    def _send_all(self) -> None:
        while True:
            try:
                self._control.send(self._outgoing.get_nowait())
            except Empty:
                return

    def _hand_out(self, message: m.Message) -> None:
        if not isinstance(message, m.Outputs):
            self._answers.put(message)
            return
        found: dict[int, tuple[Inbox, list[m.TokenOutput]]] = {}
        for new in message.outputs:
            inbox = self._inboxes.get(new.id.rpartition("/")[0])
            if inbox is not None:  # else aborted; these tokens were drawn before the driver knew
                found.setdefault(id(inbox), (inbox, []))[1].append(new)
        for inbox, outputs in found.values():
            inbox.put(outputs)

    def _has_ended(self) -> bool:
        return self._control.is_lost if self._launcher is None else self._launcher.poll() is not None

    def _explain(self, reason: str) -> EngineDeadError:
        """The best explanation there is."""
        code = self._launcher.poll() if self._launcher is not None else None
        verdict = supervision.read_verdict(self._directory)
        if code is not None and code < 0:  # and the ranks with it
            return EngineDeadError(f"the launcher of the ranks was killed by {signal.Signals(-code).name}.")
        if verdict is None:
            return EngineDeadError(reason)
        return FleetRefusedError(verdict.reason) if verdict.refused else EngineDeadError(verdict.reason)

    def _shut_down(self) -> None:
        """Ends what is left of the fleet."""
        self._send_all()
        self._control.send(m.Shutdown())
        if self._launcher is None:  # under torchrun the ranks and the directory belong to rank 0
            self._control.close()
            return
        end_launcher(self._launcher)
        self._control.close(linger=0)
        if self._launcher_end is not None:
            os.close(self._launcher_end)
        shutil.rmtree(self._directory, ignore_errors=True)
