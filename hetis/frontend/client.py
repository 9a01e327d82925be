"""A front end's hold on a fleet: starts it or attaches to it, sends requests, receives tokens, ends it."""

import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from hetis.core import messages as m
from hetis.core.config import EngineConfig
from hetis.core.plan import Plan
from hetis.frontend.channel import Answer, Channel, Inbox
from hetis.frontend.progress import ProgressBar, progress_bar
from hetis.launch import member as launch
from hetis.launch.capacity import check_processes
from hetis.launch.local_launcher import end_launcher, start_launcher


class ForkedError(RuntimeError):
    """The process was forked after the fleet was started: the connection to it belongs to the parent."""


class EngineClient:
    """One fleet. Safe to use from threads; not from a forked child, where every call raises ForkedError."""

    def __init__(self, config: EngineConfig, plan: Plan) -> None:
        """Starts the ranks on this host, or, as the front end under torchrun, attaches to those that run.

        Returns at once: `wait_until_ready` waits for the fleet.
        """
        self._pid, self._progress = os.getpid(), config.progress
        self._asking = threading.Lock()
        self._channel = _start_channel(config, plan)
        weakref.finalize(self, _close, self._channel, self._pid)

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
        self, question: m.Message, kind: type[Answer], on_progress: Callable[[m.Message], None] = lambda _: None
    ) -> Answer:
        """The answer to a question, one at a time; EngineDeadError when there will be none. `on_progress`: gets what
        comes before the answer.
        """
        self._check_process()
        with self._asking:
            return self._channel.ask(question, kind, on_progress)

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
        """Ends the fleet, which has some seconds to do so in order; returns when it has ended.

        Harmless when called again, from several threads or from a signal handler, and in a forked child.
        """
        _close(self._channel, self._pid)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"this fleet belongs to process {self._pid}, and a forked child cannot use it: "
                "make the LLM in the child, or use threads."
            )


def _start_channel(config: EngineConfig, plan: Plan) -> Channel:
    """To the fleet of torchrun, or to a new one. What was started ends if not all of it can be."""
    if launch.fleet_directory is not None:
        channel = Channel(launch.fleet_directory, None)
        channel.start()
        return channel
    if not config.oversubscribe:
        check_processes(plan)
    with ExitStack() as started:
        directory = launch.make_run_directory()
        started.callback(shutil.rmtree, directory, ignore_errors=True)
        launcher = start_launcher(config, plan, directory)
        started.callback(end_launcher, launcher)
        channel = Channel(directory, launcher)
        channel.start()
        started.pop_all()  # from here on the channel ends them
    return channel


def _close(channel: Channel, pid: int) -> None:
    if os.getpid() == pid:
        channel.close()


class _MeasuringBar(ExitStack):
    """How far measuring is, from the first message about it to the end of the block."""

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
