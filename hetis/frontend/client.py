"""A front end's use of a fleet: starts it or attaches to it, sends requests, receives tokens, ends it."""

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from hetis.core import messages as m
from hetis.core.config import EngineConfig
from hetis.frontend.channel import Answer, Channel, Inbox
from hetis.frontend.progress import ProgressBar, progress_bar
from hetis.launch.fleet import start_fleet


class ForkedError(RuntimeError):
    """This process was forked after the fleet was started: the connection to it belongs to the parent."""


class EngineClient:
    """One fleet, for any thread. In a forked child every call but `close` raises ForkedError."""

    def __init__(self, config: EngineConfig, *, measure: bool = False) -> None:
        """Starts the fleet.

        Returns at once: `wait_until_ready` waits for the fleet. `measure`: every device and link is measured anew.
        """
        self._pid, self._progress = os.getpid(), config.progress
        self._asking = threading.Lock()
        self._channel = _start_channel(config, measure)
        weakref.finalize(self, _close, self._channel, self._pid)

    @property
    def is_open(self) -> bool:
        """Whether the fleet runs, as far as this process knows."""
        return os.getpid() == self._pid and self._channel.is_open

    def wait_until_ready(self) -> m.EngineReady:
        """Waits until the fleet is up; on a terminal, a bar shows how far measuring is.

        Raises EngineDeadError when the fleet fails, FleetRefusedError when what was asked for is impossible.
        """
        with _MeasuringBar(self._progress) as bar:
            return self.ask(m.Attach(), m.EngineReady, bar.follow)

    def ask(
        self, question: m.Message, kind: type[Answer], on_progress: Callable[[m.Message], None] = lambda _: None
    ) -> Answer:
        """The answer to a question; threads ask in turn. EngineDeadError when there will be none.

        `on_progress`: called with messages that come before the answer.
        """
        self._check_process()
        with self._asking:
            return self._channel.ask(question, kind, on_progress)

    def open(self, request_ids: Iterable[str], requests: Iterable[m.Message]) -> Inbox:
        """Sends `requests`; the inbox gets the tokens of sequences whose id is `request_id/...`.

        Raises EngineDeadError when the fleet has failed, or has been closed.
        """
        self._check_process()
        return self._channel.open(request_ids, requests)

    def send(self, messages: Iterable[m.Message]) -> None:
        """Sends messages. They are lost if the fleet has ended, which inboxes report."""
        self._check_process()
        self._channel.send(messages)

    def forget(self, request_id: str) -> None:
        """Drops what still comes for this request."""
        self._channel.forget(request_id)

    def close(self) -> None:
        """Ends the fleet, which has some seconds to end in order, and waits for that.

        May be called again, from several threads, from a signal handler, and in a forked child, where it does nothing.
        """
        _close(self._channel, self._pid)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"this fleet belongs to process {self._pid}, and a forked child cannot use it: "
                "make the LLM in the child, or use threads."
            )


def _start_channel(config: EngineConfig, measure: bool) -> Channel:
    """The channel to a new fleet, of which nothing stays if not all of it can start."""
    with ExitStack() as started:
        fleet = start_fleet(config, measure=measure)
        started.callback(fleet.end)
        channel = Channel(fleet)
        channel.start()
        started.pop_all()  # the channel ends them from now on
    return channel


def _close(channel: Channel, pid: int) -> None:
    if os.getpid() == pid:
        channel.close()


class _MeasuringBar(ExitStack):
    """A bar for the progress of measuring, from the first message about it to the end of the block."""

    def __init__(self, show: bool) -> None:
        super().__init__()
        self._show, self._done = show, 0
        self._bar: ProgressBar | None = None

    def follow(self, message: m.Message) -> None:
        if not isinstance(message, m.Measuring):
            return
        if self._bar is None:
            self._bar = self.enter_context(progress_bar("measuring devices and links", message.total, show=self._show))
        self._bar.advance(message.done - self._done)
        self._done = message.done
